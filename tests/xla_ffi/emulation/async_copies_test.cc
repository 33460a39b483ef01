// Whether the emulation notices what is left out: kernels that use all of common/async_copies.cuh
// are right as they are, and fail without any one of their waits, fences and barriers.
#include "common/async_copies.cuh"

#include <cuda.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <vector>

namespace df11 {
namespace {

enum Part {
  kNothing,
  kFenceBarriers,
  kBarrierAfterInit,
  kExpect,
  kWaitForPhase,
  kBarrierBeforeRefill,
  kFenceToAsync,
  kBarrierBeforeStore,
  kWaitStoresRead,
  kBarrierAfterWait,
  kWaitStores,
  kWaitForTurn,
  kBarrierBeforeArrive,
  kArrive,
  kParts
};
constexpr const char* kNames[] = {"nothing",
                                  "fence_barriers",
                                  "barrier after init_barrier",
                                  "expect_bytes",
                                  "wait_for_phase",
                                  "barrier before the slot is filled again",
                                  "fence_to_async",
                                  "barrier before the store",
                                  "wait_stores_read",
                                  "barrier after wait_stores_read",
                                  "wait_stores",
                                  "wait_for_phase, for a warp",
                                  "barrier before arrive",
                                  "arrive"};

constexpr int kRows = 16, kCols = 64, kTiles = 6, kTileBytes = kRows * kCols * 2;

// Adds 1 to all words of a matrix of kTiles tiles side by side. A warp, two slots in, two out.
template <Part kLeftOut>
void add_one(const uint32_t* in, CUtensorMap map) {
  DF11_DYNAMIC_SHARED(memory);
  const uint32_t out = shared_address(memory), slots = out + 2 * kTileBytes;
  const uint32_t bars = slots + 2 * kTileBytes;
  const uint32_t lane = threadIdx.x;
  if (elect_lane()) {
    init_barrier(bars);
    init_barrier(bars + 8);
    if (kLeftOut != kFenceBarriers) fence_barriers();
  }
  if (kLeftOut != kBarrierAfterInit) __syncwarp();
  const auto fill = [&](int tile) {
    const uint32_t slot = tile % 2;
    if (kLeftOut != kExpect) expect_bytes(bars + 8 * slot, kTileBytes);
    copy_to_shared(slots + slot * kTileBytes, in + tile * kTileBytes / 4, kTileBytes,
                   bars + 8 * slot);
  };
  if (elect_lane()) {
    fill(0);
    fill(1);
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    const uint32_t slot = tile % 2, from = slots + slot * kTileBytes, to = out + slot * kTileBytes;
    if (kLeftOut != kWaitForPhase || tile != 3) wait_for_phase(bars + 8 * slot, tile / 2 % 2);
    uint4 words[kTileBytes / 512];
    for (int i = 0; i < kTileBytes / 512; ++i) words[i] = load_shared4(from + 512 * i + 16 * lane);
    if (kLeftOut != kBarrierBeforeRefill) __syncwarp();
    if (tile + 2 < kTiles && elect_lane()) fill(tile + 2);
    if (kLeftOut != kWaitStoresRead) wait_stores_read<1>();
    if (kLeftOut != kBarrierAfterWait) __syncwarp();
    for (int i = 0; i < kTileBytes / 512; ++i) {
      const uint4 w = words[i];
      const uint32_t row = 4 * i + lane / 8, piece = lane % 8;
      store_shared(to + 128 * row + ((piece ^ (row & 7)) << 4),
                   uint4{w.x + 1, w.y + 1, w.z + 1, w.w + 1});
    }
    if (kLeftOut != kFenceToAsync) fence_to_async();
    if (kLeftOut != kBarrierBeforeStore) __syncwarp();
    if (elect_lane()) {
      store_box(map, 0, tile, 0, to);
      commit_stores();
    }
  }
  if (kLeftOut != kWaitStores) wait_stores();
}

// Warps that add 1 to the same words, one after the other, each when it has its turn.
template <Part kLeftOut>
void add_in_turn(uint32_t* out) {
  constexpr uint32_t kWarps = 3, kRounds = 4;
  DF11_DYNAMIC_SHARED(memory);
  const uint32_t words = shared_address(memory), bars = words + 128;
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (elect_lane()) {
    init_barrier(bars + 8 * warp);
    fence_barriers();
  }
  __syncthreads();
  const uint32_t next = bars + 8 * ((warp + 1) % kWarps);
  for (uint32_t round = 0; round < kRounds; ++round) {
    const bool is_first = warp == 0 && round == 0;
    if (kLeftOut != kWaitForTurn || warp != 1) {
      wait_for_phase(bars + 8 * warp, (warp == 0) ^ (round & 1));
    }
    store_shared(words + 4 * lane, is_first ? 1 : load_shared(words + 4 * lane) + 1);
    if (kLeftOut != kBarrierBeforeArrive) __syncwarp();
    if (elect_lane() && (kLeftOut != kArrive || round > 0)) arrive(next);
  }
  __syncthreads();
  if (warp == 0) out[lane] = load_shared(words + 4 * lane);
}

template <Part kLeftOut>
bool adds_in_turn() {
  static uint32_t out[32];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(3 * 32);
  config.dynamicSmemBytes = 256;
  cudaLaunchKernelEx(&config, add_in_turn<kLeftOut>, out);
  return std::all_of(out, out + 32, [](uint32_t word) { return word == 12; });
}

template <Part kLeftOut>
bool adds_one() {
  std::vector<uint32_t> in(kTiles * kTileBytes / 4);
  for (size_t i = 0; i < in.size(); ++i) in[i] = 2654435761u * i;
  alignas(16) static uint32_t source[kTiles * kTileBytes / 4], out[kTiles * kTileBytes / 4];
  std::copy(in.begin(), in.end(), source);
  CUtensorMap map;
  const cuuint64_t dims[] = {kCols, kTiles, kRows}, strides[] = {2 * kCols, 2 * kCols * kTiles};
  const cuuint32_t box[] = {kCols, 1, kRows}, steps[] = {1, 1, 1};
  if (cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, out, dims, strides, box,
                             steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_NONE,
                             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS) {
    return false;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = 4 * kTileBytes + 16;
  cudaLaunchKernelEx(&config, add_one<kLeftOut>, source, map);
  bool right = true;
  for (int tile = 0; tile < kTiles; ++tile) {
    for (int i = 0; i < kTileBytes / 4; ++i) {
      const int row = i / (kCols / 2), col = i % (kCols / 2);
      right &= out[row * kTiles * kCols / 2 + tile * kCols / 2 + col] ==
               in[tile * kTileBytes / 4 + i] + 1;
    }
  }
  return right;
}

// In a process of its own, since what is noticed aborts.
template <int kPart>
int run() {
  int failures = 0;
  if constexpr (kPart < kParts) {
    std::fflush(stdout);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);  // what waits for ever
      constexpr Part kLeftOut = static_cast<Part>(kPart);
      _exit(adds_one<kLeftOut>() && adds_in_turn<kLeftOut>() ? 0 : 1);
    }
    int status = 0;
    waitpid(child, &status, 0);
    const bool right = WIFEXITED(status) && WEXITSTATUS(status) == 0;
    failures += right != (kPart == kNothing);
    std::printf("without %s: %s\n", kNames[kPart], right ? "right" : "noticed");
    failures += run<kPart + 1>();
  }
  return failures;
}

}  // namespace
}  // namespace df11

int main() {
  const int failures = df11::run<0>();
  std::printf("%d failures\n", failures);
  return failures != 0;
}
