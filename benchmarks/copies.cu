// What may bind the fused product on an H200, each by itself (docs/kernel.md, "What binds it"): how
// many cycles of the pipe of shared memory a bulk copy takes from look-ups, and what memory gives
// for the product's addresses.
//
//   nvcc -std=c++17 -arch=sm_90 -O3 -I xla_ffi -o copies benchmarks/copies.cu && ./copies

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "check_cuda.h"
#include "common/async_copies.cuh"

namespace df11 {
namespace {

constexpr int kBlocks = 132, kWarpSize = 32;
constexpr size_t kBytes = size_t{1} << 31;  // many times what L2 holds

__device__ void copy(uint32_t to, const char* from, uint32_t bytes, uint32_t barrier) {
  expect_bytes(barrier, bytes);
  copy_to_shared(to, from, bytes, barrier);
}

// Of the first block.
struct Taken {
  unsigned long long cycles, bytes;
};

constexpr int kReaders = 16, kReads = 16, kRounds = 2000;
constexpr uint32_t kCopiedTo = 64 << 10, kRoomOfCopier = 8 << 10;

// Warps read shared memory, each word of a lane `stride` words from the next lane's; others copy
// from L2 as long as these do.
__global__ void __launch_bounds__(1024)
    read_beside_copies(const char* from, int copiers, uint32_t piece, int stride, Taken* taken) {
  DF11_DYNAMIC_SHARED(shared);
  __shared__ uint64_t barriers[kWarpSize];
  __shared__ int readers;
  __shared__ unsigned long long copied;
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  if (threadIdx.x == 0) {
    readers = kReaders;
    copied = 0;
    for (uint64_t& barrier : barriers) init_barrier(shared_address(&barrier));
    fence_barriers();
  }
  __syncthreads();
  const long long start = clock64();
  if (warp < kReaders) {
    const uint32_t first = shared_address(shared) + lane * stride % 1024 * 4;
    uint32_t sum = 0;
    for (int round = 0; round < kRounds; ++round) {
#pragma unroll
      for (int i = 0; i < kReads; ++i) sum += load_shared(first + i % 8 * 4096);
    }
    __syncwarp();
    if (lane == 0) atomicSub(&readers, 1);
    if (sum == 0x12345678) copied = sum;  // so that it is computed
  } else if (warp < kReaders + copiers && lane == 0) {
    const uint32_t barrier = shared_address(&barriers[warp]);
    const uint32_t to = shared_address(shared) + kCopiedTo + (warp - kReaders) * kRoomOfCopier;
    const uint32_t mask = (8 << 20) - 1;
    uint32_t at = (blockIdx.x * 64 + warp) << 16;
    unsigned long long count = 0;
    for (uint32_t phase = 0; atomicAdd(&readers, 0) > 0; phase ^= 1, count += piece) {
      copy(to, from + (at & mask), piece, barrier);
      wait_for_phase(barrier, phase);
      at += piece;
    }
    atomicAdd(&copied, count);
  }
  __syncthreads();
  if (threadIdx.x == 0 && blockIdx.x == 0) {
    *taken = {static_cast<unsigned long long>(clock64() - start), copied};
  }
}

void time_pipe(const char* memory, Taken* taken) {
  constexpr int kShared = kCopiedTo + 12 * kRoomOfCopier;
  CHECK(cudaFuncSetAttribute(read_beside_copies, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kShared));
  for (const int stride : {1, 2, 4}) {  // as many wavefronts a load
    double alone = 0;
    for (const int copiers : {0, 1, 2, 4, 8, 12}) {
      for (const uint32_t piece : {1024u, 2048u, 8192u}) {
        if (copiers == 0 && piece != 1024) continue;
        for (int run = 0; run < 2; ++run) {  // the first brings it to L2
          read_beside_copies<<<kBlocks, 1024, kShared>>>(memory, copiers, piece, stride, taken);
          CHECK(cudaDeviceSynchronize());
        }
        const double cycles = taken->cycles, bytes = taken->bytes;
        if (copiers == 0) alone = cycles;
        std::printf(
            "%d wavefronts a load, %2d warps copy %4u bytes at a time: %.3f cycles a "
            "wavefront",
            stride, copiers, piece, cycles / (kReaders * kReads * kRounds * stride));
        if (copiers > 0) {
          std::printf(", %.1f bytes copied a cycle, %.0f for each cycle that reading takes longer",
                      bytes / cycles, bytes / std::max(1.0, cycles - alone));
        }
        std::printf("\n");
      }
    }
  }
}

enum class How { kCopies, kCopiesBehindPrefetch, kLoads };
constexpr const char* kHow[] = {"copies", "copies behind a prefetch of the chunk", "loads"};
constexpr uint32_t kChunk = 8192, kRecord = 2688;  // signs and mantissas; exponents
constexpr int kItemWarps = 28;

struct Matrix {
  int tiles_n, item_chunks, column_items;
  size_t chunks() const { return size_t{1} * tiles_n * item_chunks * column_items; }
};

// A warp reads an item's chunks, which are below each other, and their records, as the product
// does.
__global__ void __launch_bounds__(kItemWarps* kWarpSize)
    read_matrix(const char* chunks, const char* records, Matrix matrix, uint32_t piece, How how,
                uint32_t* unused) {
  DF11_DYNAMIC_SHARED(shared);
  __shared__ uint64_t barriers[2 * kItemWarps];
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int item = blockIdx.x * kItemWarps + warp, column = item / matrix.column_items;
  const uint32_t barrier = shared_address(&barriers[2 * warp]);
  const uint32_t to = shared_address(shared) + warp * (piece + kRecord);
  if (lane == 0) {
    init_barrier(barrier);
    init_barrier(barrier + 8);
    fence_barriers();
  }
  __syncwarp();
  if (column >= matrix.tiles_n) return;
  uint32_t phase = 0, sum = 0;
  for (int c = 0; c < matrix.item_chunks; ++c) {
    const int row = (item - column * matrix.column_items) * matrix.item_chunks + c;
    const size_t chunk = size_t{1} * row * matrix.tiles_n + column;
    const char* from = chunks + chunk * kChunk;
    if (lane == 0) {
      if (how == How::kCopiesBehindPrefetch) prefetch_copy(from, kChunk);
      copy(to + piece, records + chunk * kRecord, kRecord, barrier + 8);
    }
    wait_for_phase(barrier + 8, c & 1);
    for (uint32_t at = 0; at < kChunk; at += piece) {
      if (how == How::kLoads) {
        for (uint32_t i = at + 16 * lane; i < at + piece; i += 16 * kWarpSize) {
          const uint4 words = __ldcs(reinterpret_cast<const uint4*>(from + i));
          sum |= words.x | words.y | words.z | words.w;
        }
      } else {
        if (lane == 0) copy(to, from + at, piece, barrier);
        wait_for_phase(barrier, phase);
        phase ^= 1;
        __syncwarp();
      }
    }
  }
  if (sum == 0x12345678) *unused = sum;  // so that it is computed
}

void time_memory(const char* memory, uint32_t* unused) {
  struct {
    const char* name;
    Matrix matrix;
  } const shapes[] = {{"4096 x 28672", {448, 4, 8}}, {"14336 x 4096", {64, 2, 56}}};
  constexpr int kMostShared = 227 << 10;
  CHECK(cudaFuncSetAttribute(read_matrix, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kMostShared - 1024));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  for (const auto& [name, matrix] : shapes) {
    const size_t bytes = matrix.chunks() * (kChunk + kRecord), matrices = kBytes / bytes;
    const int blocks = (matrix.tiles_n * matrix.column_items + kItemWarps - 1) / kItemWarps;
    for (const How how : {How::kCopies, How::kCopiesBehindPrefetch, How::kLoads}) {
      for (const uint32_t piece : {1024u, 2048u, 4096u}) {
        // One block a multiprocessor, as the product has.
        const int shared = std::max<int>(kItemWarps * (piece + kRecord), kMostShared / 2 + 1024);
        float best = 1e9f;
        for (int run = 0; run < 4; ++run) {
          CHECK(cudaEventRecord(begin));
          for (size_t i = 0; i < matrices; ++i) {
            const char* chunks = memory + i * bytes;
            read_matrix<<<blocks, kItemWarps * kWarpSize, shared>>>(
                chunks, chunks + matrix.chunks() * kChunk, matrix, piece, how, unused);
          }
          CHECK(cudaEventRecord(end));
          CHECK(cudaEventSynchronize(end));
          float ms = 0;
          CHECK(cudaEventElapsedTime(&ms, begin, end));
          best = std::min(best, ms / matrices);
        }
        std::printf("%s by %s, %u bytes at a time: %.1f us, %.2f TB/s\n", name,
                    kHow[static_cast<int>(how)], piece, 1e3 * best, bytes / best * 1e-9);
      }
    }
  }
}

void run() {
  char* memory = nullptr;
  Taken* taken = nullptr;
  CHECK(cudaMalloc(&memory, kBytes));
  CHECK(cudaMemset(memory, 1, kBytes));
  CHECK(cudaMallocManaged(&taken, sizeof *taken));
  time_pipe(memory, taken);
  time_memory(memory, reinterpret_cast<uint32_t*>(taken));
}

}  // namespace
}  // namespace df11

int main() { df11::run(); }
