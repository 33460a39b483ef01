// The encoder: from one slice of bf16 weights to the native layout. Host only.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "common/parallel.h"
#include "common/simd.h"
#include "common/words.h"
#include "native/code_table.h"
#include "native/codebook.h"
#include "native/lane_vectors.h"
#include "native/layout.h"
#include "native/pairs.h"

namespace df11::native {

// Words to reserve for a step of a record: 2.6 bits a weight, and a little more.
inline constexpr int64_t kTypicalStepWords = 88;

// Pairs whose codes are joined before they are written to a stream.
inline constexpr int kGroupPairs = 4;

// The checksum's accumulators, by grid places: of even ones, then of odd ones.
using Accumulators = std::array<uint32_t, kHalfStepPairs>;

// The first of a lane's grid places in a half-step.
DF11_INLINE int grid_place(int lane) { return lane % 4 * kTileCols + lane / 4 * kLanePairs; }

// Splits a half-step's pairs into what is stored as it is, and indices of CodeTable, by grid
// places; and folds them into the checksum.
template <Simd kSimd>
DF11_INLINE void split_pairs(const HalfStepRows& rows, const Accumulators& __restrict acc,
                             Accumulators& __restrict folded, uint16_t* __restrict index,
                             uint32_t* __restrict sign_mantissa) {
  using Lanes = typename VectorOf<kSimd>::Type;
  constexpr int kColumns = sizeof(Lanes) / 2;
  const auto load = [](const auto* from, Lanes& out) { std::memcpy(&out, from, sizeof out); };
  const auto store = [](const Lanes& from, auto* to) { std::memcpy(to, &from, sizeof from); };
  for (int t = 0; t < 4; ++t) {
    const uint16_t *const from = rows.row[t], *const next_from = rows.next_row[t];
    for (int i = 0; i < kTileCols / kColumns; ++i) {
      const int place = t * kTileCols + i * kColumns, lane = i * kColumns / kLanePairs;
      uint32_t *const even_out = &folded[place / 2], *const odd_out = even_out + kHalfStepPairs / 2;
      Lanes row, next_row, even, odd;  // the rows: two neighbours a word
      load(from + i * kColumns, row);
      load(next_from + i * kColumns, next_row);
      load(&acc[place / 2], even);
      load(&acc[kHalfStepPairs / 2 + place / 2], odd);
      store((row << 1 & 0xff00ff00u) | (next_row >> 7 & 0x00ff00ffu), index + place);
      const Lanes first = (row & 0xffffu) | next_row << 16;
      const Lanes second = row >> 16 | (next_row & 0xffff0000u);
      const Lanes rest = second & kSignMantissa;
      store_lanes(sign_mantissa + lane_word(t) + lane * kRowStride,
                  (first & kSignMantissa) | rest << 24 | rest >> 8);
      fold(even, first);
      fold(odd, second);
      store(even, even_out);
      store(odd, odd_out);
    }
  }
}

// Two neighbours in a row, as one word. A loop over them vectorizes without shuffles.
DF11_INLINE uint32_t load_two(const uint16_t* two) {
  uint32_t word;
  std::memcpy(&word, two, 4);
  return word;
}

// Joins the codes of kGroupPairs neighbours in a lane: up to 48 bits of codes, and their number in
// the highest byte. Joining before the stream is written halves the encoder's work.
template <Simd>
DF11_INLINE void join_codes(const uint16_t* __restrict entries, uint64_t* __restrict groups) {
  uint32_t twos[kHalfStepPairs / 2];
  for (int i = 0; i < kHalfStepPairs / 2; ++i) {
    const uint32_t two = load_two(entries + 2 * i), length = two >> 12 & 15;
    twos[i] = (two & 0xfff) | (two >> 16 & 0xfff) << length | (length + (two >> 28)) << 24;
  }
  for (int i = 0; i < kHalfStepPairs / 4; ++i) {
    uint64_t two;
    std::memcpy(&two, twos + 2 * i, 8);
    const uint64_t length = two >> 24 & 255;
    groups[i] = (two & 0xffffff) | (two >> 32 & 0xffffff) << length | (length + (two >> 56)) << 56;
  }
}

// Writes every lane's stream, of at least min_bits, and up to eight bytes more; returns the number
// of bits in all.
template <Simd>
DF11_INLINE int64_t write_streams(const uint64_t* groups, int half_steps, int min_bits,
                                  uint8_t* const stream, std::array<int, kLanes>& bits) {
  constexpr uint64_t kCodes = (uint64_t{1} << 56) - 1;
  uint8_t* out = stream;
  uint64_t window = 0;
  int fill = 0;
  const auto append = [&](uint64_t codes, int count) {
    window |= codes << fill;
    fill += count;
    std::memcpy(out, &window, 8);
    out += fill >> 3;
    window >>= fill & ~7;
    fill &= 7;
  };
  int64_t written = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t* group = groups + grid_place(lane) / kGroupPairs;
    for (int half_step = 0; half_step < half_steps; ++half_step) {
      static_assert(kLanePairs == 2 * kGroupPairs);
      const uint64_t codes = group[0] & kCodes, next_codes = group[1] & kCodes;
      const int length = static_cast<int>(group[0] >> 56);
      const int both = length + static_cast<int>(group[1] >> 56);
      if (both <= 56) {  // nearly always
        append(codes | next_codes << length, both);
      } else {
        append(codes, length);
        append(next_codes, both - length);
      }
      group += kHalfStepPairs / kGroupPairs;
    }
    const auto position = [&] { return (out - stream) * 8 + fill; };
    for (int64_t missing; (missing = written + min_bits - position()) > 0;) {
      append(0, static_cast<int>(std::min<int64_t>(missing, 48)));
    }
    bits[lane] = static_cast<int>(position() - written);
    written = position();
  }
  std::memcpy(out, &window, 8);
  return written;
}

// Those loops, compiled for an instruction set.
struct EncoderLoops {
  void (*split_pairs)(const HalfStepRows&, const Accumulators&, Accumulators&, uint16_t*,
                      uint32_t*);
  LookUpCodes look_up_codes;
  void (*join_codes)(const uint16_t*, uint64_t*);
  int64_t (*write_streams)(const uint64_t*, int, int, uint8_t*, std::array<int, kLanes>&);
};

DF11_FOR_EACH_SIMD(void, split_pairs,
                   (const HalfStepRows& rows, const Accumulators& acc, Accumulators& folded,
                    uint16_t* index, uint32_t* sign_mantissa),
                   (rows, acc, folded, index, sign_mantissa))
DF11_FOR_EACH_SIMD(void, join_codes, (const uint16_t* entries, uint64_t* groups), (entries, groups))
DF11_FOR_EACH_SIMD(int64_t, write_streams,
                   (const uint64_t* groups, int half_steps, int min_bits, uint8_t* stream,
                    std::array<int, kLanes>& bits),
                   (groups, half_steps, min_bits, stream, bits))

inline EncoderLoops encoder_loops(Simd simd) {
  return {DF11_SELECT(simd, split_pairs), best_look_up_codes(simd), DF11_SELECT(simd, join_codes),
          DF11_SELECT(simd, write_streams)};
}

// Encodes chunks of one slice one after the other; holds the buffers they share.
class ChunkEncoder {
 public:
  ChunkEncoder(const uint16_t* weights, const View& view, const CodeTable& codes)
      : weights_(weights),
        view_(view),
        codes_(codes),
        loops_(encoder_loops(best_simd())),
        stream_(kMaxStreamBytes) {}

  // Appends the records of chunks [first, end), and writes where they begin in `records` and their
  // parts of sign_mantissa.
  void encode(int64_t first, int64_t end, uint32_t* chunk_offsets, Words& records,
              uint32_t* sign_mantissa) {
    for (int64_t index = first; index < end; ++index) {
      chunk_offsets[index] = static_cast<uint32_t>(records.size());
      encode_chunk(index, records, sign_mantissa);
    }
  }

 private:
  void encode_chunk(int64_t index, Words& records, uint32_t* sign_mantissa) {
    const Chunk chunk = locate_chunk(view_, index), next = locate_chunk(view_, index + 1);
    half_steps_ = 2 * chunk.steps;
    extent_ = Extent(view_, chunk);
    rows_ = chunk_rows(weights_, view_, chunk, tile_);
    sign_mantissa_ = sign_mantissa + chunk.sign_mantissa_word;
    const WeightsAhead here(weights_, view_, chunk, half_steps_);
    const WeightsAhead following(weights_, view_, next, half_steps_);
    patches_.clear();
    padding_is_finite_ = true;
    acc_[0].fill(0);
    for (int i = 0; i < half_steps_; ++i) {
      const int ahead = i + (view_.along_columns ? half_steps_ : kPrefetchHalfSteps);
      prefetch(ahead < half_steps_ ? here : following, ahead % half_steps_);
      const HalfStepRows rows = half_step_rows(rows_, extent_, i, codes_.pad(), copies_);
      split_pairs(rows, i);
      if (loops_.look_up_codes(index_, codes_, entries_)) {
        split_pairs(patch_uncoded(i, rows), i);
      }
      loops_.join_codes(entries_, groups_ + i * kHalfStepPairs / kGroupPairs);
    }

    std::array<int, kLanes> bits;
    int64_t total = loops_.write_streams(groups_, half_steps_, 0, stream_.data(), bits);
    int longest = *std::max_element(bits.begin(), bits.end());
    int base = *std::min_element(bits.begin(), bits.end());
    if (longest - base > 255) {
      base = longest - 255;
      total = loops_.write_streams(groups_, half_steps_, base, stream_.data(), bits);
    }
    const size_t stream_words = (total + 31) / 32;
    if (!padding_is_finite_ || kRecordHeaderWords + stream_words + patches_.size() >=
                                   size_t(kRawRecordHeaderWords + chunk.steps * kStepWords)) {
      append_raw(index, records);
      return;
    }
    uint32_t sum = checksum(index);
    for (uint32_t patch : patches_) sum += checksum_patch(patch);
    records.push_back(sum);
    records.push_back(static_cast<uint32_t>(patches_.size()) | uint32_t(base) << 16);
    for (int word = 0; word < kLanes / 4; ++word) {
      uint32_t extra = 0;
      for (int i = 0; i < 4; ++i) extra |= uint32_t(bits[4 * word + i] - base) << (8 * i);
      records.push_back(extra);
    }
    std::memcpy(records.extend(stream_words), stream_.data(), 4 * stream_words);
    records.append(patches_.data(), patches_.size());
  }

  // At least two, which share the rows of a step; few, since of rows a power of two apart a second
  // cache holds few.
  static constexpr int kPrefetchHalfSteps = 3;
  // All codes at their longest, and the eight bytes that the last store may write.
  static constexpr int kMaxStreamBytes = kTileRows * kTileCols / 2 * kMaxCodeBits / 8 + 8;

  void split_pairs(const HalfStepRows& rows, int half_step) {
    loops_.split_pairs(rows, acc_[half_step % 2], acc_[(half_step + 1) % 2], index_,
                       sign_mantissa_ + half_step * kHalfStepWords);
  }

  // Puts substitutes in place of pairs without a code, and patches them. Returns the new rows.
  HalfStepRows patch_uncoded(int half_step, HalfStepRows rows) {
    for (int t = 0; t < 4; ++t) {
      const auto copy = [&](const uint16_t*& row, uint16_t* to) {
        if (row != to) std::memcpy(to, row, 2 * kTileCols);
        row = to;
      };
      copy(rows.row[t], copies_.row + t * kTileCols);
      copy(rows.next_row[t], copies_.next_row + t * kTileCols);
    }
    const auto patch = [&](int row, int col, uint16_t& weight, uint8_t exponent) {
      if ((weight >> 7 & 255) == exponent) return;
      if (col < extent_.n_of(row)) {
        patches_.push_back(static_cast<uint32_t>(row * kTileCols + col) << 16 | weight);
      } else if (exponent == 255) {
        padding_is_finite_ = false;
      }
      weight = static_cast<uint16_t>((weight & kSignMantissa) | exponent << 7);
    };
    constexpr int kAtOnce = 32;  // few have none: most are passed by many at once
    for (int begin = 0; begin < kHalfStepPairs; begin += kAtOnce) {
      const int end = begin + kAtOnce;
      if (!std::count(entries_ + begin, entries_ + end, 0)) continue;
      for (int i = begin; i < end; ++i) {
        if (entries_[i]) continue;
        const int symbol = codes_.substitute(index_[i] >> 8, index_[i] & 255);
        const int row = pair_row(half_step, i / kTileCols), col = i % kTileCols;
        patch(row, col, copies_.row[i], codes_.first_exponent(symbol));
        patch(row + 1, col, copies_.next_row[i], codes_.second_exponent(symbol));
        entries_[i] = codes_.by_symbol()[symbol];
      }
    }
    return rows;
  }

  void append_raw(int64_t index, Words& records) {
    const size_t start = records.size();
    records.extend(kRawRecordHeaderWords);
    acc_[0].fill(0);
    for (int i = 0; i < half_steps_; ++i) {
      // Again, without the substitutes.
      split_pairs(half_step_rows(rows_, extent_, i, codes_.pad(), copies_), i);
      uint32_t* words = records.extend(kHalfStepWords);
      for (int k = 0; k < kHalfStepWords; ++k) {
        // The index has the first exponent above the second, the record below it.
        const uint32_t two = load_two(index_ + grid_place(k / kLaneWords) + k % kLaneWords * 2);
        words[k] = (two >> 8 & 0x00ff00ff) | (two & 0x00ff00ff) << 8;
      }
    }
    records.data()[start] = checksum(index);
    records.data()[start + 1] = kRawChunk;
  }

  uint32_t checksum(int64_t index) const {
    uint32_t sum = checksum_chunk(index);
    for (int i = 0; i < kHalfStepPairs / 2; ++i) {
      sum += checksum_place(acc_[0][i], 2 * i);
      sum += checksum_place(acc_[0][kHalfStepPairs / 2 + i], 2 * i + 1);
    }
    return sum;
  }

  const uint16_t* weights_;
  const View& view_;
  const CodeTable& codes_;
  const EncoderLoops loops_;
  int half_steps_ = 0;
  Extent extent_{View(), Chunk()};
  ChunkRows rows_{};
  bool padding_is_finite_ = true;
  uint32_t* sign_mantissa_ = nullptr;
  HalfStepWeights copies_;
  alignas(64) uint16_t index_[kHalfStepPairs];    // the pairs' exponents
  alignas(64) uint16_t entries_[kHalfStepPairs];  // of CodeTable
  // Half-step i goes from [i % 2] to the other, so that it can be split again. There is an even
  // number of them, which begin and end with [0].
  alignas(64) Accumulators acc_[2];
  alignas(64) uint16_t tile_[kTileRows * kTileCols];
  alignas(64) uint64_t groups_[kTileRows * kTileCols / 2 / kGroupPairs];
  std::vector<uint8_t> stream_;
  std::vector<uint32_t> patches_;
};

// Encodes the chunks of a slice by several threads: a batch by any of them, appended in order.
inline void encode_in_batches(const uint16_t* weights, const View& view, const CodeTable& codes,
                              int threads, uint32_t* chunk_offsets, Words& records,
                              uint32_t* sign_mantissa) {
  const int64_t chunks = view.chunks(), batches = (chunks + kEncodeBatch - 1) / kEncodeBatch;
  std::atomic<int64_t> next{0};
  int64_t appended = 0;
  bool failed = false;
  std::mutex mutex;
  std::condition_variable turn;
  const auto encode_batches = [&] {
    const auto encoder = std::make_unique<ChunkEncoder>(weights, view, codes);
    Words part;
    for (int64_t batch; (batch = next.fetch_add(1)) < batches;) {
      const int64_t first = batch * kEncodeBatch, end = std::min(first + kEncodeBatch, chunks);
      part.clear();
      encoder->encode(first, end, chunk_offsets, part, sign_mantissa);
      std::unique_lock<std::mutex> lock(mutex);
      turn.wait(lock, [&] { return appended == batch || failed; });
      if (failed) return;
      for (int64_t c = first; c < end; ++c) {
        chunk_offsets[c] += static_cast<uint32_t>(records.size());
      }
      records.append(part.data(), part.size());
      ++appended;
      turn.notify_all();
    }
  };
  parallel_for(std::min<int64_t>(threads, batches), threads, [&](int64_t) {
    try {
      encode_batches();
    } catch (...) {
      // Whoever waits for its turn must not wait for this thread.
      {
        const std::lock_guard<std::mutex> lock(mutex);
        failed = true;
      }
      turn.notify_all();
      throw;
    }
  });
}

// Encodes one slice of view.size weights. The caller provides chunks() + 1 and
// sign_mantissa_words() words; the records come back.
inline Words encode_slice(const uint16_t* weights, const View& view, const CodeTable& codes,
                          int threads, uint32_t* chunk_offsets, uint32_t* sign_mantissa) {
  const int64_t chunks = view.chunks();
  Words records;
  records.reserve(chunks * kTypicalStepWords * view.steps);
  if (threads > 1 && chunks > kEncodeBatch) {
    encode_in_batches(weights, view, codes, threads, chunk_offsets, records, sign_mantissa);
  } else {
    const auto encoder = std::make_unique<ChunkEncoder>(weights, view, codes);
    encoder->encode(0, chunks, chunk_offsets, records, sign_mantissa);
  }
  if (records.size() > UINT32_MAX) {
    throw std::length_error("the compressed exponents of one slice exceed 2^32 words");
  }
  chunk_offsets[chunks] = static_cast<uint32_t>(records.size());
  return records;
}

}  // namespace df11::native
