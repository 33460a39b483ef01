// The transpose against its definition: whole blocks of vectors, what is left beside them, and
// strides of which not all is used. Arrays are allocated in their exact sizes, for sanitizers.

#include "native/transpose.h"

#include <cstdio>
#include <vector>

namespace {

constexpr uint16_t kUntouched = 0xffff;

bool is_right(int64_t rows, int64_t cols, int64_t from_stride, int64_t to_stride) {
  std::vector<uint16_t> from(rows ? (rows - 1) * from_stride + cols : 0);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<uint16_t>(i);
  std::vector<uint16_t> to((cols - 1) * to_stride + rows, kUntouched), expected = to;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t col = 0; col < cols; ++col) {
      expected[col * to_stride + row] = from[row * from_stride + col];
    }
  }
  df11::native::transpose(from.data(), from_stride, rows, cols, to.data(), to_stride);
  return to == expected;
}

}  // namespace

int main() {
  int failures = 0;
  for (int64_t rows : {0, 1, 7, 8, 9, 63, 64, 65}) {
    for (int64_t cols : {8, 16, 64}) {
      for (int64_t unused : {0, 1, 8}) {
        if (is_right(rows, cols, cols + unused, rows + unused)) continue;
        ++failures;
        std::printf("FAILED: %d x %d, strides larger by %d\n", static_cast<int>(rows),
                    static_cast<int>(cols), static_cast<int>(unused));
      }
    }
  }
  return failures != 0;
}
