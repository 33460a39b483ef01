// Decodes a group of chunks at a time by a warp, through shared memory: for GPUs of compute
// capability 9.0 and up, whose bulk copies bring records, signs and mantissas without taking up the
// warp, and store whole boxes. A group is two neighbouring chunks, which are rows of 256 bytes:
// each lane follows two streams, one of each. Or it is one chunk, whose warp is done sooner.
//
// Only groups of coded chunks that lie within the matrix and whose records are not too long are
// decoded so. For the others, which are few, decode_chunk.cuh serves.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/async_copies.cuh"
#include "native/cuda/decode_chunk.cuh"
#include "native/cuda/staged_stream.cuh"
#include "native/layout.h"

namespace df11::native {

// A group's chunks, at most.
inline constexpr int kMostChunks = 2;

// A step's signs and mantissas of one chunk, and its weights of all: a box of (row, chunk, column).
inline constexpr uint32_t kStepBytes = 4 * kStepWords;
inline constexpr uint32_t kRowBytes = 2 * kTileCols;
inline constexpr uint32_t kBoxBytes = kMostChunks * kStepRows * kRowBytes;

// The group's records, which follow each other, with what rounding to 16 bytes adds: for two,
// exponents of up to 2.86 bits a weight in chunks of 8 steps. Lanes may read behind them as they
// may behind kStagedWords.
inline constexpr uint32_t kGroupWords = 1472;
inline constexpr uint32_t kGroupBytes = 4 * (kGroupWords + kStagedOverread);
static_assert(kGroupBytes % 16 == 0);

// What a warp has of shared memory, by addresses. All of it is there twice, to be used in turn:
// while one is decoded, or stored, copies fill the other.
struct WarpMemory {
  uint32_t boxes;     // [2] of kBoxBytes, aligned to that: weights to be stored
  uint32_t slots;     // [2][chunk] of kStepBytes: signs and mantissas
  uint32_t records;   // [2] of kGroupBytes
  uint32_t barriers;  // [4] of 8 bytes: of the slots, of the records

  __device__ uint32_t record_barrier(uint32_t buffer) const { return barriers + 16 + 8 * buffer; }
};
inline constexpr uint32_t kWarpBoxBytes = 2 * kBoxBytes;
inline constexpr uint32_t kWarpSlotBytes = 2 * kMostChunks * kStepBytes;
inline constexpr uint32_t kWarpInputBytes = kWarpSlotBytes + 2 * kGroupBytes;
inline constexpr uint32_t kWarpBarrierBytes = 4 * 8;

// Where a group is.
template <int kChunks>
struct ChunkGroup {
  uint32_t chunk;                 // the first; the others are the next
  const uint32_t* sign_mantissa;  // of the first; the others' follow
  int row, tile;                  // of its first weight, in the tensor map's matrix
  uint32_t offsets[kChunks + 1];  // where the records begin, and where the last ends

  __device__ bool records_fit(int64_t exponents_words) const {
    bool fit = offsets[kChunks] <= exponents_words && words() <= kGroupWords;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      fit &= offsets[u] <= offsets[u + 1] && offsets[u + 1] - offsets[u] >= kRecordHeaderWords;
    }
    return fit;
  }
  // Rounded outwards to 16 bytes.
  __device__ uint32_t begin() const { return offsets[0] & ~3u; }
  __device__ uint32_t words() const { return ((offsets[kChunks] + 3) & ~3u) - begin(); }
};

// What a lane looks up of the bit stream of one chunk.
class LaneStream {
 public:
  __device__ void start(uint32_t record, uint32_t bit, uint32_t table) {
    stream_.start(record, bit - kWindowLead);
    table_ = table;
  }

  __device__ __forceinline__ void next_two(uint32_t& entry0, uint32_t& entry1) {
    stream_.next_two([this](uint32_t window) { return look_up(window); }, entry0, entry1);
  }

 private:
  // The table is aligned to its size: its address is put in by the instruction that masks.
  __device__ __forceinline__ uint32_t look_up(uint32_t window) const {
    constexpr uint32_t kOffsets = (kTableSize - 1) * sizeof(uint32_t);
#ifdef __CUDACC__
    uint32_t address;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;"  // (window & offsets) | table
        : "=r"(address)
        : "r"(window), "n"(kOffsets), "r"(table_));
    return load_shared_constant(address);
#else
    return load_shared_constant((window & kOffsets) | table_);
#endif
  }

  StagedStream stream_;
  uint32_t table_;
};

// Decodes the groups that it is given, one after the other.
template <int kChunks>
class GroupDecoder {
  static_assert(kChunks == 1 || kChunks == 2);
  using Group = ChunkGroup<kChunks>;

 public:
  // A barrier of the warp has to follow. `zero` is 0, for after_loads.
  __device__ GroupDecoder(const WarpMemory& memory, const Lane& lane, uint32_t zero)
      : memory_(memory), lane_(lane), odd_(kChunks == 2 ? lane.number & 1 : 0), zero_(zero) {
    if (elect_lane()) {
      for (int i = 0; i < 4; ++i) init_barrier(memory.barriers + 8 * i);
      fence_barriers();
    }
  }

  // Before the first group of a slice: its first copies, which fly while the table is made.
  __device__ void begin_slice(const Slice& slice, const Group& first, const CUtensorMap& map) {
    // These first: records have to wait for their offsets.
    if (elect_lane()) {
      for (uint32_t slot = 0; slot < 2; ++slot) {
        fill_slot(slot, first.sign_mantissa + slot * kStepWords, slice.view.steps);
      }
      prefetch_map(map);
    }
    keep_order();
    staged_ = stage_records(slice, first, buffer_);
  }

  // Decodes `group`, and has the copies for `next` begun if there are more. False if it is left to
  // others, because it is not of the kind. Chunks that turn out to be corrupt are poisoned.
  __device__ bool decode(const Slice& slice, const Group& group, const Group& next, bool more,
                         const CUtensorMap& map, uint32_t table, bool sound) {
    const bool opened = staged_ && open_records(group, slice.view.steps, table) && sound;
    staged_ = more && stage_records(slice, next, buffer_ ^ 1);
    if (opened) {
      decode_steps(slice.view.steps, group, next, more, map);
      finish(slice, group);
    } else {
      skip_steps(slice.view.steps, next, more);
    }
    buffer_ ^= 1;
    return opened;
  }

 private:
  // Begins to copy the records, if their places can be right and there is room. What was loaded of
  // the buffer's former records went into the checksums, or into the lengths, that all lanes have
  // compared since: no load is still to read it whose value matters.
  __device__ bool stage_records(const Slice& slice, const Group& group, uint32_t buffer) {
    if (!group.records_fit(slice.exponents_words)) return false;
    if (elect_lane()) {
      const uint32_t barrier = memory_.record_barrier(buffer);
      expect_bytes(barrier, 4 * group.words());
      copy_to_shared(memory_.records + buffer * kGroupBytes, slice.exponents + group.begin(),
                     4 * group.words(), barrier);
    }
    return true;
  }

  // Begins to copy a step of all chunks. By one lane.
  __device__ void fill_slot(uint32_t slot, const uint32_t* from, int steps) const {
    const uint32_t barrier = memory_.barriers + 8 * slot;
    const uint32_t to = memory_.slots + kMostChunks * slot * kStepBytes;
    expect_bytes(barrier, kChunks * kStepBytes);
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      copy_to_shared(to + u * kStepBytes, from + u * steps * kStepWords, kStepBytes, barrier);
    }
  }

  // Waits for the records, and checks what they say of their lengths.
  __device__ bool open_records(const Group& group, int steps, uint32_t table) {
    wait_for_phase(memory_.record_barrier(buffer_), record_phases_ >> buffer_ & 1);
    record_phases_ ^= 1u << buffer_;
    bool sound = true;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      const uint32_t words = group.offsets[u + 1] - group.offsets[u];
      const uint32_t record =
          memory_.records + buffer_ * kGroupBytes + 4 * (group.offsets[u] - group.begin());
      const uint32_t counts = load_shared(record + 4), patches = counts & 0xffff;
      const uint32_t extras = load_shared(record + 8 + lane_.number / 4 * 4);
      const uint32_t bits = (counts >> 16) + (extras >> (8 * (lane_.number % 4)) & 255);
      const uint32_t end = sum_up_to(bits, lane_.number);
      const uint32_t total = __shfl_sync(kAllLanes, end, kLanes - 1);
      // A raw chunk claims more patches than there is room for.
      sound &= words == kRecordHeaderWords + (total + 31) / 32 + patches;
      checksum_[u] = load_shared(record);
      start_[u] = 32 * kRecordHeaderWords + end - bits;
      patches_[u] = patches;
      patch_at_[u] = record + 4 * (words - patches);
      record_[u] = record;
    }
    if (!sound) return false;
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      stream_[u].start(of_stream(record_, u), of_stream(start_, u), table);
      sum_[u] = 0;
      applied_[u] = 0;
      // Patches behind the last step count as applied.
      uint32_t ignored = 0;
      for (uint32_t i = lane_.number; i < patches_[u]; i += kLanes) {
        const uint32_t patch = load_shared(patch_at_[u] + 4 * i);
        sum_[u] += checksum_patch(patch);
        ignored += patch_step(patch) >= steps;
      }
      if (patches_[u]) applied_[u] = sum_of_warp(ignored);
      left_[u] = patches_[u] - applied_[u];
      applied_[u] = 0;
      find_next_patch(u);
    }
    return true;
  }

  // A lane's streams are of chunks 0 and 1, in odd lanes of 1 and 0: see decode_half_step.
  __device__ uint32_t of_stream(const uint32_t (&of_chunk)[kChunks], int stream) const {
    return odd_ ? of_chunk[kChunks - 1 - stream] : of_chunk[stream];
  }

  __device__ static int patch_step(uint32_t patch) { return static_cast<int>(patch >> 26); }
  __device__ void find_next_patch(int u) {
    patched_step_[u] = left_[u] ? patch_step(load_shared(patch_at_[u] + 4 * applied_[u])) : -1;
  }

  // Waits for a step's signs and mantissas; slots are taken in turn.
  __device__ void wait_for_slot(uint32_t slot) {
    wait_for_phase(memory_.barriers + 8 * slot, slot_phase_);
    slot_phase_ ^= slot;
  }

  __device__ void decode_steps(int steps, const Group& group, const Group& next, bool more,
                               const CUtensorMap& map) {
    uint32_t acc[kChunks][kLanePairs] = {};
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const uint32_t slot = step & 1;
      wait_for_slot(slot);
      uint4 words[kChunks][2];  // by stream
      const uint32_t from = memory_.slots + kMostChunks * slot * kStepBytes + 16 * lane_.number;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          words[i][h] = load_shared4(from + (i ^ odd_) * kStepBytes + h * (kStepBytes / 2));
        }
      }
      wait_stores_read<1>();
      __syncwarp();  // All lanes have issued their loads, and the box may be filled again.
      const uint32_t box = memory_.boxes + slot * kBoxBytes;
      decode_half_step(0, words, acc, box);
      // Not before, so that nobody waits for the loads.
      const bool here =
          step + 2 < steps;  // else it is the next group's that is needed in two steps
      if ((here || more) && elect_lane()) {
        const uint32_t* from = here ? group.sign_mantissa : next.sign_mantissa - steps * kStepWords;
        uint32_t at = (step + 2) * kStepWords;
#pragma unroll
        for (int i = 0; i < kChunks; ++i) {
          at = after_loads(at, zero_, words[i][0].x, words[i][1].x);
        }
        fill_slot(slot, from + at, steps);
      }
      decode_half_step(1, words, acc, box);
#pragma unroll
      for (int u = 0; u < kChunks; ++u) {
        if (patched_step_[u] == step) apply_patches(u, step, box);
      }
      fence_to_async();
      __syncwarp();  // The box is complete.
      if (elect_lane()) {
        store_box(map, 0, group.tile, group.row + step * kStepRows, box);
        commit_stores();
      }
    }
    uint32_t sum[kChunks] = {};  // by stream
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kLanePairs; ++j) sum[i] += checksum_place(acc[i][j], lane_.place() + j);
    }
#pragma unroll
    for (int u = 0; u < kChunks; ++u) sum_[u] += of_stream(sum, u);
  }

  __device__ __forceinline__ void decode_half_step(int h, const uint4 (&words)[kChunks][2],
                                                   uint32_t (&acc)[kChunks][kLanePairs],
                                                   uint32_t box) {
    uint32_t pair[kChunks][kLanePairs];
#pragma unroll
    for (int j = 0; j < kLaneWords; ++j) {
      uint32_t entry[kChunks][2];
#pragma unroll
      for (int i = 0; i < kChunks; ++i) stream_[i].next_two(entry[i][0], entry[i][1]);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        const uint4& all = words[i][h];
        const uint32_t word = j == 0 ? all.x : j == 1 ? all.y : j == 2 ? all.z : all.w;
        pair[i][2 * j] = merge_in_one(entry[i][0], word);
        pair[i][2 * j + 1] = merge_in_one(entry[i][1], rotl(word, 8));
        acc[i][2 * j] = checksum_step(acc[i][2 * j], pair[i][2 * j]);
        acc[i][2 * j + 1] = checksum_step(acc[i][2 * j + 1], pair[i][2 * j + 1]);
      }
    }
    // Of a pair of chunks, the box's row 4 t + 2 h + r of chunk u is its line 8 t + 4 h + 2 r + u,
    // where lane 4 g + t stores at n = 8 g. Were all lanes to store the same r and u at a time, the
    // four lanes of a g would meet in the same banks, since the lines' places depend on their
    // number modulo 8. So lanes take the four lines of a half-step in another order for each t. Of
    // one chunk, the row is the line, and two lanes meet as they are.
    const bool seconds_first = kChunks == 2 && (lane_.number & 2);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int line = kChunks * (2 * h + r) + i;
        store_shared(place_of_line(box, line), one_of_each(pair[i], seconds_first != (r == 1)));
      }
    }
  }

  // Boxes are swizzled by 128 bytes, so that few lanes meet in a bank: the map is told so.
  __device__ static uint32_t place_in_box(uint32_t box, int k, int u, int n) {
    const int line = kChunks * k + u;
    return box + line * kRowBytes + ((n / 8 ^ (line & 7)) << 4) + n % 8 * 2;
  }
  // Of the lane's lines, eight or four, taken in its own order.
  __device__ uint32_t place_of_line(uint32_t box, int line) const {
    const uint32_t t = lane_.number & 3, g = lane_.number >> 2;
    const uint32_t first_line = kChunks == 2 ? 8 * t + t : 4 * t;
    const uint32_t first = box + first_line * kRowBytes + ((g ^ (first_line & 7)) << 4);
    return first ^ line * (kRowBytes + 16);  // of both, the line and the place in it
  }

  // Patches are sorted by step. If they are not, some are left at the end.
  __device__ __forceinline__ void apply_patches(int u, int step, uint32_t box) {
    __syncwarp();  // All lanes have stored what is patched.
    for (;;) {
      const uint32_t i = applied_[u] + lane_.number;
      const uint32_t patch = i < patches_[u] ? load_shared(patch_at_[u] + 4 * i) : ~0u;
      const bool here = patch_step(patch) == step;
      if (here) {
        const int k = patch >> 22 & (kStepRows - 1), n = patch >> 16 & (kTileCols - 1);
        store_shared(place_in_box(box, k, u, n), static_cast<uint16_t>(patch));
      }
      const uint32_t count = __popc(__ballot_sync(kAllLanes, here));
      applied_[u] += count;
      left_[u] -= count;
      if (count < kLanes) break;
    }
    find_next_patch(u);
  }

  // Lets the copies of signs and mantissas that were begun arrive, and begins those of the next
  // group.
  __device__ void skip_steps(int steps, const Group& next, bool more) {
    for (uint32_t slot = 0; slot < 2; ++slot) {
      wait_for_slot(slot);
      __syncwarp();  // No lane waits for the former phase any more.
      if (more && elect_lane()) {
        fill_slot(slot, next.sign_mantissa + slot * kStepWords, steps);
      }
    }
  }

  // Poisons what is corrupt.
  __device__ void finish(const Slice& slice, const Group& group) {
#pragma unroll
    for (int u = 0; u < kChunks; ++u) {
      const uint32_t sum = sum_of_warp(sum_[u]) + checksum_chunk(group.chunk + u);
      if (sum == checksum_[u] && left_[u] == 0) continue;
      wait_stores();
      __syncwarp();  // The stores are done, whichever lane's they were.
      poison_chunk<false>(slice, group.chunk + u, lane_);
    }
  }

  WarpMemory memory_;
  Lane lane_;
  uint32_t odd_;  // the chunk of the lane's first stream
  uint32_t zero_;
  bool staged_ = false;
  uint32_t buffer_ = 0, record_phases_ = 0, slot_phase_ = 0;

  // Of the present group.
  LaneStream stream_[kChunks];
  uint32_t record_[kChunks], start_[kChunks], sum_[kChunks], checksum_[kChunks];
  uint32_t patches_[kChunks], patch_at_[kChunks], applied_[kChunks], left_[kChunks];
  int patched_step_[kChunks];
};

}  // namespace df11::native
