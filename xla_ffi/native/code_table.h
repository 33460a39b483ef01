// What the encoder looks up for each pair of exponents. Host only.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <vector>

#include "common/simd.h"
#include "native/codebook.h"
#include "native/layout.h"

#ifdef DF11_X86
#include <immintrin.h>
#endif

namespace df11::native {

// Entries have the code in bits 0..11 and its length above; 0 stands for a pair without a code.
class CodeTable {
 public:
  explicit CodeTable(const Codebook& book) : book_(book), by_pair_(65536, 0) {
    std::array<uint16_t, kSymbols> codes{};
    assign_codes(book, codes);
    by_first_.fill(-1);
    by_second_.fill(-1);
    numbers_.fill(kUnnumbered);
    for (int symbol = 0; symbol < kSymbols; ++symbol) {
      by_symbol_[symbol] = static_cast<uint16_t>(codes[symbol] | book.lengths[symbol] << 12);
      if (!book.lengths[symbol]) continue;
      const int first = first_exponent(symbol), second = second_exponent(symbol);
      // Exponent 0 may have two numbers, for it also fills unused places of the codebook.
      set_number(first, symbol / kCodedExponents);
      set_number(second, symbol % kCodedExponents);
      uint16_t& entry = by_pair_[first << 8 | second];
      if (!entry) entry = by_symbol_[symbol];
      by_first_[first] = shorter(by_first_[first], symbol);
      by_second_[second] = shorter(by_second_[second], symbol);
      any_ = shorter(any_, symbol);
      // Padding has to be finite, and cheap.
      if (first == second && first != 255) pad_ = shorter(pad_, symbol);
    }
    while (least_ < 255 && numbers_[least_] == kUnnumbered) ++least_;
    for (int exponent = least_; exponent < 256; ++exponent) {
      const uint8_t number = numbers_[exponent] ^ kUnnumbered;
      if (exponent < least_ + 32) {
        near_numbers_[exponent - least_] = number;
      } else if (number) {
        is_narrow_ = false;
      }
    }
  }

  // Number of an exponent that has none.
  static constexpr uint8_t kUnnumbered = 0xf0;

  const uint16_t* by_pair() const { return by_pair_.data(); }      // [first exponent << 8 | second]
  const uint16_t* by_symbol() const { return by_symbol_.data(); }  // [symbol]
  const uint8_t* numbers() const { return numbers_.data(); }       // [exponent]

  // Whether all coded exponents but 0 are one of 32 that begin with least(), as those of most
  // tensors. near_numbers() are the numbers of these, XORed with kUnnumbered: 0 stands for none.
  bool is_narrow() const { return is_narrow_; }
  int least() const { return least_; }
  const uint8_t* near_numbers() const { return near_numbers_.data(); }

  uint8_t first_exponent(int symbol) const { return book_.exponents[symbol / kCodedExponents]; }
  uint8_t second_exponent(int symbol) const { return book_.exponents[symbol % kCodedExponents]; }

  // A finite weight, positive and without mantissa, that is cheap to store.
  uint16_t pad() const { return static_cast<uint16_t>(pad_ < 0 ? 0 : first_exponent(pad_) << 7); }

  // The symbol that stands in the stream for a pair without a code: the shortest that is right in
  // one of its weights, so that only the other must be patched.
  int substitute(uint8_t first, uint8_t second) const {
    const int either = shorter(by_first_[first], by_second_[second]);
    return either >= 0 ? either : any_;
  }

 private:
  void set_number(int exponent, int number) {
    if (numbers_[exponent] == kUnnumbered) numbers_[exponent] = static_cast<uint8_t>(number);
  }
  int shorter(int a, int b) const {
    return a < 0 || (b >= 0 && book_.lengths[b] < book_.lengths[a]) ? b : a;
  }

  Codebook book_;
  std::vector<uint16_t> by_pair_;
  alignas(64) std::array<uint16_t, kSymbols> by_symbol_;
  alignas(64) std::array<uint8_t, 256> numbers_;
  std::array<int16_t, 256> by_first_, by_second_;
  int any_ = -1, pad_ = -1, least_ = 1;
  bool is_narrow_ = true;
  std::array<uint8_t, 32> near_numbers_{};
};

// Looks up a half-step's pairs, each given by its exponents: index[i] = first << 8 | second.
// Returns whether one of them has no code.
inline bool look_up_codes(const uint16_t* index, const CodeTable& codes, uint16_t* entries) {
  const uint16_t* table = codes.by_pair();
  using Eight = uint16_t __attribute__((vector_size(16)));
  decltype(Eight{} == 0) uncoded{};
  for (int i = 0; i < kHalfStepPairs; i += 8, index += 8) {
    // Stored at once, for a core stores less often than it loads.
    const Eight found = {table[index[0]], table[index[1]], table[index[2]], table[index[3]],
                         table[index[4]], table[index[5]], table[index[6]], table[index[7]]};
    std::memcpy(entries + i, &found, sizeof found);
    uncoded |= found == 0;
  }
  uint64_t any[2];
  std::memcpy(any, &uncoded, sizeof uncoded);
  return (any[0] | any[1]) != 0;
}

#ifdef DF11_X86
#define DF11_TARGET_AVX512BW __attribute__((target("avx512f,avx512bw")))
#define DF11_TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))

// The same with all of the codebook in registers: from the numbers of exponents, of which both
// weights of a pair have a byte, to entries.
class CodesInRegisters {
 public:
  DF11_TARGET_AVX512BW DF11_INLINE explicit CodesInRegisters(const CodeTable& codes) {
    for (int i = 0; i < 8; ++i) by_symbol_[i] = _mm512_loadu_si512(codes.by_symbol() + 32 * i);
  }

  DF11_TARGET_AVX512BW DF11_INLINE void look_up(const __m512i& numbers, uint16_t* entries) {
    const __m512i symbol = _mm512_or_si512(numbers, _mm512_srli_epi16(numbers, 4));
    const __mmask32 bit6 = _mm512_movepi16_mask(_mm512_slli_epi16(symbol, 9));
    const __mmask32 bit7 = _mm512_movepi16_mask(_mm512_slli_epi16(symbol, 8));
    const __m512i low = _mm512_mask_blend_epi16(
        bit6, _mm512_permutex2var_epi16(by_symbol_[0], symbol, by_symbol_[1]),
        _mm512_permutex2var_epi16(by_symbol_[2], symbol, by_symbol_[3]));
    const __m512i high = _mm512_mask_blend_epi16(
        bit6, _mm512_permutex2var_epi16(by_symbol_[4], symbol, by_symbol_[5]),
        _mm512_permutex2var_epi16(by_symbol_[6], symbol, by_symbol_[7]));
    const __mmask32 numbered =
        _mm512_testn_epi16_mask(numbers, _mm512_set1_epi16(static_cast<int16_t>(0xf0f0)));
    const __m512i found =
        _mm512_maskz_mov_epi16(numbered, _mm512_mask_blend_epi16(bit7, low, high));
    _mm512_storeu_si512(entries, found);
    uncoded_ |= _mm512_testn_epi16_mask(found, found);
  }

  bool any_uncoded() const { return uncoded_ != 0; }

 private:
  __m512i by_symbol_[8];
  __mmask32 uncoded_ = 0;
};

// The numbers are looked up in both halves of a table of 32: shuffles take the lowest four bits of
// a byte, or give 0 where its highest bit is set.
DF11_TARGET_AVX512BW inline bool look_up_codes_avx512(const uint16_t* index, const CodeTable& codes,
                                                      uint16_t* entries) {
  if (!codes.is_narrow()) return look_up_codes(index, codes, entries);
  CodesInRegisters registers(codes);
  const __m128i* near = reinterpret_cast<const __m128i*>(codes.near_numbers());
  // (Of the broadcast without a mask, GCC 12 warns that it is not initialized.)
  const __m512i low = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(near));
  const __m512i high = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128(near + 1));
  const __m512i least = _mm512_set1_epi8(static_cast<char>(codes.least()));
  const __m512i least_of_high = _mm512_set1_epi8(static_cast<char>(codes.least() + 16));
  // With 0x80 - 16 added, the highest bit of 16 and more is set, and the lowest four stay.
  const __m512i others = _mm512_set1_epi8(0x70);
  const __m512i unnumbered = _mm512_set1_epi8(static_cast<char>(CodeTable::kUnnumbered));
  const __m512i of_zero = _mm512_set1_epi8(static_cast<char>(codes.numbers()[0]));
  for (int i = 0; i < kHalfStepPairs; i += 32) {
    const __m512i exponents = _mm512_loadu_si512(index + i);
    const __m512i in_low = _mm512_adds_epu8(_mm512_sub_epi8(exponents, least), others);
    const __m512i in_high = _mm512_adds_epu8(_mm512_sub_epi8(exponents, least_of_high), others);
    const __m512i numbers = _mm512_xor_si512(
        _mm512_or_si512(_mm512_shuffle_epi8(low, in_low), _mm512_shuffle_epi8(high, in_high)),
        unnumbered);
    const __mmask64 zero = _mm512_testn_epi8_mask(exponents, exponents);
    registers.look_up(_mm512_mask_mov_epi8(numbers, zero, of_zero), entries + i);
  }
  return registers.any_uncoded();
}

// Here in a table of all exponents.
DF11_TARGET_VBMI inline bool look_up_codes_vbmi(const uint16_t* index, const CodeTable& codes,
                                                uint16_t* entries) {
  CodesInRegisters registers(codes);
  __m512i numbers[4];
  for (int i = 0; i < 4; ++i) numbers[i] = _mm512_loadu_si512(codes.numbers() + 64 * i);
  for (int i = 0; i < kHalfStepPairs; i += 32) {
    const __m512i exponents = _mm512_loadu_si512(index + i);
    registers.look_up(
        _mm512_mask_blend_epi8(_mm512_movepi8_mask(exponents),
                               _mm512_permutex2var_epi8(numbers[0], exponents, numbers[1]),
                               _mm512_permutex2var_epi8(numbers[2], exponents, numbers[3])),
        entries + i);
  }
  return registers.any_uncoded();
}
#endif

using LookUpCodes = bool (*)(const uint16_t*, const CodeTable&, uint16_t*);

inline LookUpCodes best_look_up_codes([[maybe_unused]] Simd simd) {
#ifdef DF11_X86
  if (simd == Simd::kAvx512Vbmi) return look_up_codes_vbmi;
  if (simd == Simd::kAvx512) return look_up_codes_avx512;
#endif
  return look_up_codes;
}

}  // namespace df11::native
