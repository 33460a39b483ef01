// How the CPU decoder reads streams: by look-ups of up to three pairs, several lanes at a time.
// Host only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/simd.h"
#include "native/codebook.h"
#include "native/layout.h"

#ifdef DF11_X86
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace df11::native {

// Pairs of one lane, and the look-ups that it takes at most: each finds at least one.
inline constexpr int kMostLanePairs = 2 * kMaxSteps * kLanePairs;

// What 12 bits of a stream begin with: one to three symbols, as many as have their codes there.
// (A GPU's warp must know how many a look-up gives; a CPU's lanes need not keep step.) It has to
// stay small, since it shares the first cache with all that a chunk is made of.
struct LookUpTable {
  // The length of the codes in bits 0..5, for a shift takes these alone; the number of symbols in
  // bits 6..7; the symbols above, the first one lowest.
  uint32_t entries[kTableSize];
  // Of a symbol: by its high half, then by its low one.
  alignas(16) uint8_t exponents[kCodedExponents];
};

// Fills the table; `symbols` is the one that build_table makes.
template <Simd>
DF11_INLINE void fill_entries(const uint16_t* __restrict symbols, uint32_t* __restrict entries) {
  // At 2^n + bits is the entry of the symbol that n bits begin with, or 0 where its code does not
  // end in them. So shifting that index by the length of a code gives the one of what is left.
  constexpr uint32_t kNumber = 1 << 6;
  uint16_t ones[2 * kTableSize];
  for (int n = 0; n <= kMaxCodeBits; ++n) {
    for (int bits = 0; bits < 1 << n; ++bits) {
      ones[(1 << n) + bits] =
          static_cast<uint16_t>((symbols[bits] & 255) <= n ? symbols[bits] + kNumber : 0);
    }
  }
  for (uint32_t bits = 0; bits < kTableSize; ++bits) {
    const uint32_t at = kTableSize + bits, first = ones[at];
    const uint32_t at_second = at >> (first & 63), second = ones[at_second];
    const uint32_t third = ones[at_second >> (second & 63)];
    entries[bits] = (first & 255) + (second & 255) + (third & 255) + (first & 0xff00) +
                    ((second & 0xff00) << 8) + ((third & 0xff00) << 16);
  }
}

DF11_FOR_EACH_SIMD(void, fill_entries, (const uint16_t* symbols, uint32_t* entries),
                   (symbols, entries))

// The lanes of one grid row. Each look-up waits for the one before it in its lane, so a core
// must follow several lanes to be busy.
inline constexpr int kRowLanes = kLanes / 4;

// What the look-ups of a grid row find, lane by lane: entries of the table. That they are put
// together later, and not at once, leaves a look-up five instructions, and the windows of all
// lanes in registers.
struct RowEntries {
  alignas(64) uint32_t lane[kRowLanes][kMostLanePairs];
};

// The exponents of a grid row's pairs: that of weight k in the low byte.
struct RowExponents {
  alignas(64) uint16_t half_step[2 * kMaxSteps][kRowLanes][kLanePairs];
};

// Decodes each lane from bit starts[4 * lane] up to the next lane's start or beyond; `count` pairs
// of each, a multiple of 4, are enough. Returns the number of look-ups, a multiple of 4; after each
// four of a lane it calls `meanwhile`.
template <typename Meanwhile>
DF11_INLINE int look_up_row(const uint8_t* streams, const uint32_t* starts, int count,
                            const LookUpTable& table, RowEntries& out, Meanwhile& meanwhile) {
  uint64_t at[kRowLanes];  // 64 bits, else compilers add constants to addresses by themselves
  uint32_t longest = 0;
  for (int l = 0; l < kRowLanes; ++l) {
    at[l] = starts[4 * l];
    longest = std::max(longest, starts[4 * l + 1] - starts[4 * l]);
  }
  const int least = static_cast<int>(longest / kMaxCodeBits);
  int look_ups = 0;
  for (bool more = true; more && look_ups < count;) {
    // 64 bits less at most 7 serve four look-ups of at most 12. The highest bit marks how far
    // the window was shifted.
    uint64_t window[kRowLanes];
    for (int l = 0; l < kRowLanes; ++l) {
      std::memcpy(&window[l], streams + (at[l] >> 3), 8);
      window[l] = window[l] >> (at[l] & 7) | uint64_t{1} << 63;
    }
#pragma GCC unroll 1  // else compilers gather four entries in a vector, and look-ups wait for it
    for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 8
      for (int l = 0; l < kRowLanes; ++l) {
        const uint32_t entry = table.entries[window[l] & (kTableSize - 1)];
        out.lane[l][look_ups + i] = entry;
        window[l] >>= entry & 63;
#if defined(__clang__) && defined(DF11_X86)  // else the windows of all lanes are put into vectors
        asm("" : "+r"(window[l]));
#endif
      }
    }
    for (int l = 0; l < kRowLanes; ++l) at[l] += __builtin_clzll(window[l]);
    meanwhile();
    look_ups += 4;
    if (look_ups < least) continue;
    more = false;
    for (int l = 0; l < kRowLanes; ++l) more |= at[l] < starts[4 * l + 1];
  }
  return look_ups;
}

// From look-ups, which it may change, to exponents: `count` pairs of each lane, a multiple of 16.
// Returns whether all lanes have as many.
using JoinSymbols = bool (*)(RowEntries& entries, int look_ups, int count, const uint8_t* exponents,
                             RowExponents& out);

// The symbols of a grid row, lane by lane. Those of all lanes are put together before the first is
// read again: a load waits for stores that it overlaps.
struct RowSymbols {
  alignas(64) uint8_t lane[kRowLanes][3 * kMostLanePairs + 64];
};

inline bool join_symbols(RowEntries& entries, int look_ups, int count, const uint8_t* exponents,
                         RowExponents& out) {
  RowSymbols symbols;
  bool complete = true;
  for (int l = 0; l < kRowLanes; ++l) {
    uint8_t* to = symbols.lane[l];
    for (int i = 0; i < look_ups; ++i) {
      const uint32_t entry = entries.lane[l][i], found = entry >> 8;
      std::memcpy(to, &found, 4);
      to += entry >> 6 & 3;
    }
    complete &= to - symbols.lane[l] >= count;
  }
  for (int l = 0; l < kRowLanes; ++l) {
#ifdef __aarch64__
    const uint8x16_t table = vld1q_u8(exponents);
    for (int i = 0; i < count; i += 16) {
      const uint8x16_t both = vld1q_u8(symbols.lane[l] + i);
      const uint8x16_t first = vqtbl1q_u8(table, vshrq_n_u8(both, 4));
      const uint8x16_t second = vqtbl1q_u8(table, vandq_u8(both, vdupq_n_u8(15)));
      uint16_t(*to)[kRowLanes][kLanePairs] = out.half_step + i / kLanePairs;
      vst1q_u8(reinterpret_cast<uint8_t*>(to[0][l]), vzip1q_u8(first, second));
      vst1q_u8(reinterpret_cast<uint8_t*>(to[1][l]), vzip2q_u8(first, second));
    }
#else
    for (int i = 0; i < count; ++i) {
      const uint8_t symbol = symbols.lane[l][i];
      out.half_step[i / kLanePairs][l][i % kLanePairs] =
          static_cast<uint16_t>(exponents[symbol >> 4] | exponents[symbol & 15] << 8);
    }
#endif
  }
  return complete;
}

#ifdef DF11_X86
// From the symbols of all lanes to exponents.
DF11_TARGET_AVX2 inline void expand_symbols(const RowSymbols& symbols, int count,
                                            const uint8_t* exponents, RowExponents& out) {
  const __m256i table =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(exponents)));
  for (int l = 0; l < kRowLanes; ++l) {
    for (int half_step = 0; half_step < count / kLanePairs; half_step += 2) {
      const __m256i both = _mm256_cvtepu8_epi16(_mm_load_si128(
          reinterpret_cast<const __m128i*>(symbols.lane[l] + half_step * kLanePairs)));
      const __m256i halves =
          _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(both, 4), _mm256_slli_epi16(both, 8)),
                           _mm256_set1_epi8(15));
      const __m256i pairs = _mm256_shuffle_epi8(table, halves);
      _mm_store_si128(reinterpret_cast<__m128i*>(out.half_step[half_step][l]),
                      _mm256_castsi256_si128(pairs));
      _mm_store_si128(reinterpret_cast<__m128i*>(out.half_step[half_step + 1][l]),
                      _mm256_extracti128_si256(pairs, 1));
    }
  }
}

using FourTwos = uint64_t __attribute__((vector_size(32)));
using EightTwos = uint64_t __attribute__((vector_size(64)));

// As join_symbols, but neighbouring look-ups of a lane are joined first, several twos in a vector:
// up to six symbols, and their number in the highest byte. That leaves half as many stores. (What
// is behind the last look-up may be joined, too; it is not read.)
template <typename Twos>
DF11_INLINE bool join_twos(RowEntries& entries, int look_ups, int count, const uint8_t* exponents,
                           RowExponents& out) {
  for (int l = 0; l < kRowLanes; ++l) {
    for (int i = 0; i < look_ups; i += sizeof(Twos) / 4) {
      Twos two;
      std::memcpy(&two, entries.lane[l] + i, sizeof two);
      two = (two >> 8 & 0xffffff) | two >> 40 << (two >> 3 & 24) |
            ((two & 0xc0) + (two >> 32 & 0xc0)) << 50;
      std::memcpy(entries.lane[l] + i, &two, sizeof two);
    }
  }
  RowSymbols symbols;
  bool complete = true;
  constexpr int kLanesTogether = 4;  // since each end of the loop is mispredicted
  for (int l = 0; l < kRowLanes; l += kLanesTogether) {
    uint8_t* to[kLanesTogether];
    for (int k = 0; k < kLanesTogether; ++k) to[k] = symbols.lane[l + k];
    for (int i = 0; i < look_ups; i += 2) {
      for (int k = 0; k < kLanesTogether; ++k) {
        uint64_t two;
        std::memcpy(&two, entries.lane[l + k] + i, 8);
        std::memcpy(to[k], &two, 8);
        to[k] += two >> 56;
      }
    }
    for (int k = 0; k < kLanesTogether; ++k) complete &= to[k] - symbols.lane[l + k] >= count;
  }
  expand_symbols(symbols, count, exponents, out);
  return complete;
}

DF11_TARGET_AVX2 inline bool join_symbols_avx2(RowEntries& entries, int look_ups, int count,
                                               const uint8_t* exponents, RowExponents& out) {
  return join_twos<FourTwos>(entries, look_ups, count, exponents, out);
}

DF11_TARGET_AVX512 inline bool join_symbols_avx512(RowEntries& entries, int look_ups, int count,
                                                   const uint8_t* exponents, RowExponents& out) {
  return join_twos<EightTwos>(entries, look_ups, count, exponents, out);
}

// 16 look-ups are put together at once.
__attribute__((target("avx2,avx512f,avx512bw,avx512vbmi2,popcnt"))) inline bool join_symbols_vbmi2(
    RowEntries& entries, int look_ups, int count, const uint8_t* exponents, RowExponents& out) {
  RowSymbols symbols;
  bool complete = true;
  // Byte i of an entry is a symbol if the number of them, the upper bits of byte 0, is at least i.
  const __m512i byte_0 = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0x00000000);
  const __m512i least = _mm512_set1_epi32(static_cast<int>(0xc08040ff));
  for (int l = 0; l < kRowLanes; ++l) {
    uint8_t* to = symbols.lane[l];
    for (int i = 0; i < look_ups; i += 16) {
      // What is behind the last look-up counts for nothing.
      const __m512i found = _mm512_load_si512(entries.lane[l] + i);
      const __mmask64 used = _mm512_cmpge_epu8_mask(_mm512_shuffle_epi8(found, byte_0), least) &
                             ~uint64_t{0} >> (64 - 4 * std::min(look_ups - i, 16));
      _mm512_storeu_si512(to, _mm512_maskz_compress_epi8(used, found));
      to += __builtin_popcountll(used);
    }
    complete &= to - symbols.lane[l] >= count;
  }
  expand_symbols(symbols, count, exponents, out);
  return complete;
}
#endif

inline JoinSymbols best_join_symbols([[maybe_unused]] Simd simd) {
#ifdef DF11_X86
  if (simd == Simd::kAvx512Vbmi) return join_symbols_vbmi2;
  if (simd == Simd::kAvx512) return join_symbols_avx512;
  if (simd == Simd::kAvx2) return join_symbols_avx2;
#endif
  return join_symbols;
}

}  // namespace df11::native
