// Transposes of tiles of weights, for views along columns. Host only.
#pragma once

#include <cstdint>

#ifdef __SSE2__
#include <emmintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace df11::native {

#ifdef __SSE2__
#define DF11_TRANSPOSE_8X8 1
inline void transpose_8x8(const uint16_t* from, int64_t from_stride, uint16_t* to,
                          int64_t to_stride) {
  __m128i a[8], b[8];
  for (int i = 0; i < 8; ++i) {
    a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i * from_stride));
  }
  for (int i = 0; i < 4; ++i) {
    b[2 * i] = _mm_unpacklo_epi16(a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm_unpackhi_epi16(a[2 * i], a[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    for (int j = 0; j < 2; ++j) {
      a[4 * i + 2 * j] = _mm_unpacklo_epi32(b[4 * i + j], b[4 * i + j + 2]);
      a[4 * i + 2 * j + 1] = _mm_unpackhi_epi32(b[4 * i + j], b[4 * i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const auto row = [&](int j) { return reinterpret_cast<__m128i*>(to + j * to_stride); };
    _mm_storeu_si128(row(2 * i), _mm_unpacklo_epi64(a[i], a[i + 4]));
    _mm_storeu_si128(row(2 * i + 1), _mm_unpackhi_epi64(a[i], a[i + 4]));
  }
}
#elif defined(__aarch64__)
#define DF11_TRANSPOSE_8X8 1
inline void transpose_8x8(const uint16_t* from, int64_t from_stride, uint16_t* to,
                          int64_t to_stride) {
  uint16x8_t a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = vld1q_u16(from + i * from_stride);
  // A weight's place has three bits of its row, then three of its column. Zipping row i with row
  // i + 4 rotates them by one: thrice, and rows and columns are exchanged.
  const auto zip = [](const uint16x8_t* rows, uint16x8_t* zipped) {
    for (int i = 0; i < 4; ++i) {
      zipped[2 * i] = vzip1q_u16(rows[i], rows[i + 4]);
      zipped[2 * i + 1] = vzip2q_u16(rows[i], rows[i + 4]);
    }
  };
  zip(a, b);
  zip(b, a);
  zip(a, b);
  for (int i = 0; i < 8; ++i) vst1q_u16(to + i * to_stride, b[i]);
}
#endif

// The transpose of rows x cols weights; cols is a multiple of 8.
inline void transpose(const uint16_t* from, int64_t from_stride, int64_t rows, int64_t cols,
                      uint16_t* to, int64_t to_stride) {
  int64_t row = 0;
#ifdef DF11_TRANSPOSE_8X8
  for (; row + 8 <= rows; row += 8) {
    for (int64_t col = 0; col < cols; col += 8) {
      transpose_8x8(from + row * from_stride + col, from_stride, to + col * to_stride + row,
                    to_stride);
    }
  }
#endif
  for (; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      to[col * to_stride + row] = from[row * from_stride + col];
    }
  }
}

}  // namespace df11::native
