// The encoder: from one slice of bf16 weights to the native layout. Host only.
#pragma once

#include <algorithm>
#include <array>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

#include "codebook.h"
#include "layout.h"
#include "pairs.h"
#include "parallel.h"
#include "simd.h"
#include "words.h"

namespace df11 {

// Words to reserve for a chunk's record: 2.6 bits a weight, and a little more.
inline constexpr int64_t kTypicalRecordWords = 700;

// What the encoder writes for each pair of exponents.
class CodeTable {
 public:
  static constexpr uint32_t kUncoded = 1u << 31;  // the code is a substitute's

  // Bits 0..11: code, 16..23: symbol, 27..30: length.
  explicit CodeTable(const Codebook& book) : book_(book), entries_(65536) {
    std::array<uint16_t, kSymbols> codes{};
    assign_codes(book, codes);
    const auto entry_of = [&](int symbol) {
      return codes[symbol] | uint32_t(symbol) << 16 | uint32_t{book.lengths[symbol]} << 27;
    };
    const auto shorter = [&](int a, int b) {
      return a < 0 || (book.lengths[b] && book.lengths[b] < book.lengths[a]) ? b : a;
    };
    // A pair without a code borrows the shortest that is right in one of its weights,
    // so that only the other must be patched.
    std::array<int, 256> by_first, by_second;
    by_first.fill(-1);
    by_second.fill(-1);
    int any = -1;
    for (int symbol = 0; symbol < kSymbols; ++symbol) {
      if (!book.lengths[symbol]) continue;
      int& first = by_first[first_exponent(symbol)];
      int& second = by_second[second_exponent(symbol)];
      first = shorter(first, symbol);
      second = shorter(second, symbol);
      any = shorter(any, symbol);
    }
    for (int first = 0; first < 256; ++first) {
      uint32_t* row = entries_.data() + (first << 8);
      const int by_row = by_first[first];
      std::fill_n(row, 256, entry_of(by_row >= 0 ? by_row : any) | kUncoded);
      for (int second : book.exponents) {
        if (by_second[second] < 0) continue;
        row[second] = entry_of(shorter(by_row, by_second[second])) | kUncoded;
      }
    }
    for (int symbol = 0; symbol < kSymbols; ++symbol) {
      if (book.lengths[symbol]) {
        entries_[first_exponent(symbol) << 8 | second_exponent(symbol)] = entry_of(symbol);
      }
    }
    pad_ = uint32_t{first_exponent(any)} << 7;
  }

  const uint32_t* entries() const { return entries_.data(); }
  uint32_t pad() const { return pad_; }  // a weight that is cheap to store

  // The pair with the exponents of the symbol that stands for it in the stream.
  uint32_t substitute(uint32_t pair) const {
    const int symbol = entries_[exponent_index(pair)] >> 16 & 255;
    return merge_pair(table_entry(first_exponent(symbol), second_exponent(symbol), 0), pair);
  }

 private:
  uint8_t first_exponent(int symbol) const { return book_.exponents[symbol / kCodedExponents]; }
  uint8_t second_exponent(int symbol) const { return book_.exponents[symbol % kCodedExponents]; }

  Codebook book_;
  std::vector<uint32_t> entries_;
  uint32_t pad_;
};

// The loops of the encoder that vectorize, over all pairs of a chunk's half-steps.
template <Simd>
DF11_INLINE void split_pairs(const uint32_t* __restrict pairs, int count,
                             uint32_t* __restrict sign_mantissa, uint16_t* __restrict index) {
  for (int i = 0; i < count / 2; ++i) {
    const uint32_t a = pairs[2 * i] & kSignMantissa, b = pairs[2 * i + 1] & kSignMantissa;
    sign_mantissa[i] = a | rotl(b, -8);
  }
  for (int i = 0; i < count; ++i) index[i] = exponent_index(pairs[i]);
}

// Joins the codes of four neighbours in a lane, from CodeTable's entries: up to 48 bits of
// codes, and their number in the highest byte. uncoded[h] tells whether half-step h has an entry
// with kUncoded. Joining before the stream is written halves the encoder's work.
template <Simd>
DF11_INLINE void join_codes(const uint64_t* __restrict entry_pairs, int half_steps,
                            uint64_t* __restrict groups, uint64_t* __restrict uncoded) {
  constexpr int kPerHalfStep = kHalfStepPairs / 2;
  constexpr uint64_t kCodes = (uint64_t{1} << 56) - 1;
  uint64_t twos[kPerHalfStep];
  for (int h = 0; h < half_steps; ++h) {
    uint64_t any = 0;
    for (int i = 0; i < kPerHalfStep; ++i) {
      const uint64_t entries = entry_pairs[h * kPerHalfStep + i];
      const uint64_t first_length = entries >> 27 & 15;
      twos[i] = (entries & 0xfff) | (entries >> 32 & 0xfff) << first_length |
                (first_length + (entries >> 59 & 15)) << 56;
      any |= entries;
    }
    uncoded[h] = any & (uint64_t{CodeTable::kUncoded} << 32 | CodeTable::kUncoded);
    for (int i = 0; i < kPerHalfStep / 2; ++i) {
      const uint64_t a = twos[2 * i], b = twos[2 * i + 1];
      groups[h * kPerHalfStep / 2 + i] =
          (a & kCodes) | (b & kCodes) << (a >> 56) | ((a >> 56) + (b >> 56)) << 56;
    }
  }
}

template <Simd>
DF11_INLINE uint32_t pairs_checksum(const uint32_t* __restrict pairs, int count) {
  uint32_t acc[kHalfStepPairs] = {};
  for (const uint32_t* end = pairs + count; pairs < end; pairs += kHalfStepPairs) {
    for (int i = 0; i < kHalfStepPairs; ++i) acc[i] = checksum_step(acc[i], pairs[i]);
  }
  uint32_t sum = 0;
  for (int i = 0; i < kHalfStepPairs; ++i) sum += checksum_place(acc[i], i);
  return sum;
}

// Those loops, compiled for an instruction set.
struct EncoderLoops {
  void (*split_pairs)(const uint32_t*, int, uint32_t*, uint16_t*);
  void (*join_codes)(const uint64_t*, int, uint64_t*, uint64_t*);
  uint32_t (*pairs_checksum)(const uint32_t*, int);
};

DF11_FOR_EACH_SIMD(void, split_pairs,
                   (const uint32_t* pairs, int count, uint32_t* sign_mantissa, uint16_t* index),
                   (pairs, count, sign_mantissa, index))
DF11_FOR_EACH_SIMD(void, join_codes,
                   (const uint64_t* entry_pairs, int half_steps, uint64_t* groups,
                    uint64_t* uncoded),
                   (entry_pairs, half_steps, groups, uncoded))
DF11_FOR_EACH_SIMD(uint32_t, pairs_checksum, (const uint32_t* pairs, int count), (pairs, count))

inline EncoderLoops encoder_loops(Simd simd) {
  return {DF11_SELECT(simd, split_pairs), DF11_SELECT(simd, join_codes),
          DF11_SELECT(simd, pairs_checksum)};
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

  // Appends the chunk's record and writes its part of sign_mantissa.
  void encode(int64_t index, Words& records, uint32_t* sign_mantissa) {
    const Chunk chunk = locate_chunk(view_, index);
    half_steps_ = 2 * chunk.steps;
    load(chunk);
    loops_.split_pairs(pairs_, half_steps_ * kHalfStepPairs,
                       sign_mantissa + chunk.sign_mantissa_word, index_);

    patches_.clear();
    look_up_codes();
    std::array<int, kLanes> bits;
    int64_t total = write_streams(0, bits);
    int longest = *std::max_element(bits.begin(), bits.end());
    int base = *std::min_element(bits.begin(), bits.end());
    if (longest - base > 255) {
      base = longest - 255;
      total = write_streams(base, bits);
    }
    const size_t stream_words = (total + 31) / 32;
    if (kRecordHeaderWords + stream_words + patches_.size() >=
        size_t(kRawRecordHeaderWords + chunk.steps * kStepWords)) {
      load(chunk);  // without the substitutes
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

 private:
  static constexpr int kGroupPairs = 4;  // whose codes join_codes joins
  // All codes at their longest, and the eight bytes that the last store may write.
  static constexpr int kMaxStreamBytes = kTileRows * kTileCols / 2 * kMaxCodeBits / 8 + 8;

  void load(const Chunk& chunk) {
    for (int half_step = 0; half_step < half_steps_; ++half_step) {
      uint32_t* pairs = pairs_ + half_step * kHalfStepPairs;
      for (int t = 0; t < 4; ++t) {
        load_pairs(weights_, view_, chunk.row + pair_row(half_step, t), chunk.col, codes_.pad(),
                   pairs + t * kTileCols);
      }
    }
  }

  // Fills groups_; puts substitutes in place of pairs without a code, and patches them.
  void look_up_codes() {
    const uint32_t* table = codes_.entries();
    const int count = half_steps_ * kHalfStepPairs;
    for (int i = 0; i < count; i += 2) {
      entries_[i / 2] = table[index_[i]] | uint64_t{table[index_[i + 1]]} << 32;
    }
    uint64_t uncoded[2 * kSteps];
    loops_.join_codes(entries_, half_steps_, groups_, uncoded);
    for (int half_step = 0; half_step < half_steps_; ++half_step) {
      if (!uncoded[half_step]) continue;
      for (int i = 0; i < kHalfStepPairs / 2; ++i) {
        const uint64_t entries = entries_[half_step * kHalfStepPairs / 2 + i];
        if (entries & CodeTable::kUncoded) add_patches(half_step, 2 * i);
        if (entries >> 32 & CodeTable::kUncoded) add_patches(half_step, 2 * i + 1);
      }
    }
  }

  void add_patches(int half_step, int place) {
    uint32_t& pair = pairs_[half_step * kHalfStepPairs + place];
    const uint32_t substitute = codes_.substitute(pair);
    const int t = place / kTileCols, col = place % kTileCols;
    const uint32_t position = static_cast<uint32_t>(pair_row(half_step, t)) * kTileCols + col;
    if ((pair ^ substitute) & 0xffff) patches_.push_back(position << 16 | (pair & 0xffff));
    if ((pair ^ substitute) >> 16) patches_.push_back((position + kTileCols) << 16 | pair >> 16);
    pair = substitute;
  }

  // Writes every lane's stream, of at least min_bits; returns the number of bits in all.
  int64_t write_streams(int min_bits, std::array<int, kLanes>& bits) {
    uint8_t* out = stream_.data();
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
      const uint64_t* group =
          groups_ + (lane % 4 * kTileCols + lane / 4 * kLanePairs) / kGroupPairs;
      for (int half_step = 0; half_step < half_steps_; ++half_step) {
        for (int i = 0; i < kLanePairs / kGroupPairs; ++i) {
          append(group[i] & 0xffffffffffff, static_cast<int>(group[i] >> 56));
        }
        group += kHalfStepPairs / kGroupPairs;
      }
      const auto position = [&] { return (out - stream_.data()) * 8 + fill; };
      for (int64_t missing; (missing = written + min_bits - position()) > 0;) {
        append(0, static_cast<int>(std::min<int64_t>(missing, 48)));
      }
      bits[lane] = static_cast<int>(position() - written);
      written = position();
    }
    std::memcpy(out, &window, 8);
    return written;
  }

  void append_raw(int64_t index, Words& records) const {
    records.push_back(checksum(index));
    records.push_back(kRawChunk);
    for (int i = 0; i < half_steps_ * kHalfStepPairs; i += 2) {
      const auto bytes = [](uint32_t pair) { return (pair >> 7 & 255) | (pair >> 23 & 255) << 8; };
      records.push_back(bytes(pairs_[i]) | bytes(pairs_[i + 1]) << 16);
    }
  }

  uint32_t checksum(int64_t index) const {
    return checksum_chunk(index) + loops_.pairs_checksum(pairs_, half_steps_ * kHalfStepPairs);
  }

  const uint16_t* weights_;
  const View& view_;
  const CodeTable& codes_;
  const EncoderLoops loops_;
  int half_steps_ = 0;
  uint32_t pairs_[kTileRows * kTileCols / 2];
  uint16_t index_[kTileRows * kTileCols / 2];
  uint64_t entries_[kTileRows * kTileCols / 4];  // of CodeTable, two at a time
  uint64_t groups_[kTileRows * kTileCols / 2 / kGroupPairs];
  std::vector<uint8_t> stream_;
  std::vector<uint32_t> patches_;
};

// Encodes one slice of view.size weights. The caller provides kCodebookWords,
// chunks() + 1 and sign_mantissa_words() words; the records come back.
inline Words encode_slice(const uint16_t* weights, const View& view, int threads,
                          uint32_t* codebook, uint32_t* chunk_offsets, uint32_t* sign_mantissa) {
  const Codebook book = choose_codebook(count_pairs(weights, view, threads));
  book.pack(codebook);
  const CodeTable codes(book);
  const int64_t chunks = view.chunks(), batches = (chunks + kEncodeBatch - 1) / kEncodeBatch;
  Words records;
  records.reserve(chunks * kTypicalRecordWords);
  // Batches are encoded by any thread, but appended in order.
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
      for (int64_t c = first; c < end; ++c) {
        chunk_offsets[c] = static_cast<uint32_t>(part.size());
        encoder->encode(c, part, sign_mantissa);
      }
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
  if (records.size() > UINT32_MAX) {
    throw std::length_error("the compressed exponents of one slice exceed 2^32 words");
  }
  chunk_offsets[chunks] = static_cast<uint32_t>(records.size());
  while (records.size() % 4) records.push_back(0);
  return records;
}

}  // namespace df11
