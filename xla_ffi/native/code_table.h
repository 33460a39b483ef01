// What the encoder looks up for each pair of exponents. Host only.
#pragma once

#include <array>
#include <cstdint>
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
  }

  // Number of an exponent that has none.
  static constexpr uint8_t kUnnumbered = 0xf0;

  const uint16_t* by_pair() const { return by_pair_.data(); }      // [first exponent << 8 | second]
  const uint16_t* by_symbol() const { return by_symbol_.data(); }  // [symbol]
  const uint8_t* numbers() const { return numbers_.data(); }       // [exponent]

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
  int any_ = -1, pad_ = -1;
};

// Looks up a half-step's pairs, each given by its exponents: index[i] = first << 8 | second.
// Returns whether one of them has no code.
inline bool look_up_codes(const uint16_t* index, const CodeTable& codes, uint16_t* entries) {
  const uint16_t* table = codes.by_pair();
  // In fours, since compilers do not unroll it; and no search, which would not vectorize.
  for (int i = 0; i < kHalfStepPairs; i += 4) {
    for (int k = i; k < i + 4; ++k) entries[k] = table[index[k]];
  }
  uint16_t uncoded = 0;
  for (int i = 0; i < kHalfStepPairs; ++i) uncoded |= static_cast<uint16_t>(entries[i] == 0);
  return uncoded != 0;
}

#ifdef DF11_X86
#define DF11_TARGET_VBMI __attribute__((target("avx512f,avx512bw,avx512vbmi")))

// The same with all of the codebook in registers.
DF11_TARGET_VBMI inline bool look_up_codes_vbmi(const uint16_t* index, const CodeTable& codes,
                                                uint16_t* entries) {
  __m512i numbers[4], by_symbol[8];
  for (int i = 0; i < 4; ++i) numbers[i] = _mm512_loadu_si512(codes.numbers() + 64 * i);
  for (int i = 0; i < 8; ++i) by_symbol[i] = _mm512_loadu_si512(codes.by_symbol() + 32 * i);
  __mmask32 uncoded = 0;
  for (int i = 0; i < kHalfStepPairs; i += 32) {
    const __m512i exponents = _mm512_loadu_si512(index + i);
    const __m512i both = _mm512_mask_blend_epi8(
        _mm512_movepi8_mask(exponents), _mm512_permutex2var_epi8(numbers[0], exponents, numbers[1]),
        _mm512_permutex2var_epi8(numbers[2], exponents, numbers[3]));
    const __m512i symbol = _mm512_or_si512(both, _mm512_srli_epi16(both, 4));
    const __mmask32 bit6 = _mm512_movepi16_mask(_mm512_slli_epi16(symbol, 9));
    const __mmask32 bit7 = _mm512_movepi16_mask(_mm512_slli_epi16(symbol, 8));
    const __m512i low =
        _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(by_symbol[0], symbol, by_symbol[1]),
                                _mm512_permutex2var_epi16(by_symbol[2], symbol, by_symbol[3]));
    const __m512i high =
        _mm512_mask_blend_epi16(bit6, _mm512_permutex2var_epi16(by_symbol[4], symbol, by_symbol[5]),
                                _mm512_permutex2var_epi16(by_symbol[6], symbol, by_symbol[7]));
    const __mmask32 numbered =
        _mm512_testn_epi16_mask(both, _mm512_set1_epi16(static_cast<int16_t>(0xf0f0)));
    const __m512i found =
        _mm512_maskz_mov_epi16(numbered, _mm512_mask_blend_epi16(bit7, low, high));
    _mm512_storeu_si512(entries + i, found);
    uncoded |= _mm512_testn_epi16_mask(found, found);
  }
  return uncoded != 0;
}
#endif

using LookUpCodes = bool (*)(const uint16_t*, const CodeTable&, uint16_t*);

// Not every processor with the rest of AVX-512 has VBMI.
inline LookUpCodes best_look_up_codes([[maybe_unused]] Simd simd) {
#ifdef DF11_X86
  if (simd == Simd::kAvx512 && __builtin_cpu_supports("avx512vbmi")) return look_up_codes_vbmi;
#endif
  return look_up_codes;
}

}  // namespace df11::native
