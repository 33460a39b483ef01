// Encodes or decodes a matrix, along rows or columns, some number of times, on one thread, to count
// instructions: those of two rounds less those of one are of 262,144 weights. On x86-64 it encodes
// with AVX2, which valgrind has, and decodes without. docs/figures.md has what came out.
//
//   g++ -std=c++17 -O3 -DNDEBUG -I. -Ixla_ffi -pthread -o count benchmarks/host_instructions.cc
//   valgrind --tool=callgrind --callgrind-out-file=/dev/null ./count encode rows 1
//
// For aarch64, with aarch64-linux-gnu-g++ and -static in the place of g++:
//
//   qemu-aarch64-static -singlestep -d exec,nochain ./count decode columns 2 2>&1 |
//     grep -c ^Trace

#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "native/cpu/decode_slices.h"
#include "tests/xla_ffi/native/encoded_slice.h"

using namespace df11::native;

int main(int argc, char** argv) {
  if (argc != 4) return 1;
  const bool encodes = std::string(argv[1]) == "encode";
  const int64_t dims[] = {512, 512};
  std::vector<uint16_t> weights(512 * 512), decoded(weights.size());
  std::mt19937 random_bits;
  std::normal_distribution<float> normal(0, 0.02f);
  for (uint16_t& weight : weights) {
    const float value = normal(random_bits);
    std::memcpy(&weight, reinterpret_cast<const char*>(&value) + 2, 2);
  }
  Layout layout = default_layout(dims, 2);
  layout.along_columns = std::string(argv[2]) == "columns";
  const View view = make_view(layout);
  const EncodedSlice slice = encode_slice(weights.data(), layout, 1);
  const auto decoder = std::make_unique<ChunkDecoder>(df11::Simd::kPortable);
  decoder->set_slice({view, kMaxCodeBits, slice.codebook.data(), slice.chunk_offsets.data(),
                      slice.exponents.data(), static_cast<int64_t>(slice.exponents.size()),
                      slice.sign_mantissa.data()});
  for (int round = 0; round < std::atoi(argv[3]); ++round) {
    if (encodes) encode_slice(weights.data(), layout, 1);
    for (int64_t chunk = 0; !encodes && chunk < view.chunks(); ++chunk) {
      if (!decoder->decode(chunk, decoded.data())) return 2;
    }
  }
  return !encodes && decoded != weights;
}
