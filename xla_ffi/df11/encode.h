// The encoder: from one slice of bf16 weights to the native layout. Host only.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "codebook.h"
#include "layout.h"
#include "parallel.h"

namespace df11 {

// Chunks that one thread takes at a time.
inline constexpr int64_t kEncodeBatch = 64;

inline std::array<uint32_t, kHeaderWords> make_header(const int64_t* dims, int ndim) {
  std::array<uint32_t, kHeaderWords> header{};
  header[0] = kFormatVersion;
  header[1] = static_cast<uint32_t>(ndim);
  for (int i = 0; i < ndim; ++i) {
    header[2 + 2 * i] = static_cast<uint32_t>(dims[i]);
    header[3 + 2 * i] = static_cast<uint32_t>(dims[i] >> 32);
  }
  return header;
}

// Index of a pair's exponents in a table of 65,536 entries.
DF11_HD uint16_t exponent_index(uint32_t pair) {
  return static_cast<uint16_t>((pair << 1 & 0xff00u) | (pair >> 23 & 0xffu));
}

// The pairs of grid row t of a half-step, whose first row in the view is `row`: `col` is
// the tile's first column. Returns false, with padding filled by `pad`, at the view's edge.
inline bool load_pairs(const uint16_t* weights, const View& view, int64_t row, int64_t col,
                       uint32_t pad, uint32_t* __restrict pairs) {
  if (col + kTileCols <= view.cols && (row + 1) * view.cols + col + kTileCols <= view.size) {
    const uint16_t* __restrict first = weights + row * view.cols + col;
    const uint16_t* __restrict second = first + view.cols;
    for (int i = 0; i < kTileCols; ++i) pairs[i] = first[i] | uint32_t{second[i]} << 16;
    return true;
  }
  const auto at = [&](int64_t r, int64_t c) -> uint32_t {
    return c < view.cols && r * view.cols + c < view.size ? weights[r * view.cols + c] : pad;
  };
  for (int i = 0; i < kTileCols; ++i) {
    pairs[i] = at(row, col + i) | at(row + 1, col + i) << 16;
  }
  return false;
}

DF11_HD int64_t pair_row(int half_step, int t) {
  return half_step / 2 * kStepRows + 4 * t + 2 * (half_step % 2);
}

// Counts pairs of exponents, leaving out row pairs at the edges, which may hold padding.
inline std::vector<uint64_t> count_pairs(const uint16_t* weights, const View& view,
                                         int threads) {
  const int64_t batches = (view.chunks() + kEncodeBatch - 1) / kEncodeBatch;
  std::vector<std::vector<uint32_t>> partial(std::min<int64_t>(threads, batches));
  std::atomic<int64_t> next{0};
  parallel_for(partial.size(), threads, [&](int64_t slot) {
    // Two tables, used in turn: a pair often equals its neighbour, and a counter that was
    // just stored is slow to load.
    std::vector<uint32_t>& counts = partial[slot];
    counts.assign(2 * 65536, 0);
    uint32_t pairs[kTileCols];
    uint16_t at[kTileCols];
    for (int64_t batch; (batch = next.fetch_add(1)) < batches;) {
      const int64_t end = std::min((batch + 1) * kEncodeBatch, view.chunks());
      for (int64_t c = batch * kEncodeBatch; c < end; ++c) {
        const Chunk chunk = locate_chunk(view, c);
        for (int half_step = 0; half_step < 2 * chunk.steps; ++half_step) {
          for (int t = 0; t < 4; ++t) {
            const int64_t row = chunk.row + pair_row(half_step, t);
            if (!load_pairs(weights, view, row, chunk.col, 0, pairs)) continue;
            for (int i = 0; i < kTileCols; ++i) at[i] = exponent_index(pairs[i]);
            for (int i = 0; i < kTileCols; i += 2) {
              ++counts[at[i]];
              ++counts[65536 + at[i + 1]];
            }
          }
        }
      }
    }
  });
  std::vector<uint64_t> total(65536, 0);
  for (const std::vector<uint32_t>& counts : partial) {
    for (int i = 0; i < 65536; ++i) total[i] += uint64_t{counts[i]} + counts[65536 + i];
  }
  return total;
}

// What the encoder writes for each pair of exponents.
class CodeTable {
 public:
  static constexpr uint32_t kUncoded = 1u << 31;  // the code is a substitute's

  // Bits 0..11: code, 12..15: length, 16..23: symbol.
  explicit CodeTable(const Codebook& book) : book_(book), entries_(65536) {
    std::array<uint16_t, kSymbols> codes{};
    assign_codes(book, codes);
    const auto entry_of = [&](int symbol) {
      return codes[symbol] | uint32_t{book.lengths[symbol]} << 12 | uint32_t(symbol) << 16;
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
    for (int pair = 0; pair < 65536; ++pair) {
      int substitute = by_first[pair >> 8];
      if (by_second[pair & 255] >= 0) substitute = shorter(substitute, by_second[pair & 255]);
      entries_[pair] = entry_of(substitute >= 0 ? substitute : any) | kUncoded;
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

// Encodes chunks of one slice one after the other; holds the buffers they share.
class ChunkEncoder {
 public:
  ChunkEncoder(const uint16_t* weights, const View& view, const CodeTable& codes)
      : weights_(weights), view_(view), codes_(codes), stream_(kMaxStreamBytes) {}

  // Appends the chunk's record and writes its part of sign_mantissa.
  void encode(int64_t index, std::vector<uint32_t>& records, uint32_t* sign_mantissa) {
    const Chunk chunk = locate_chunk(view_, index);
    half_steps_ = 2 * chunk.steps;
    load(chunk);
    write_sign_mantissa(sign_mantissa + chunk.sign_mantissa_word);

    patches_.clear();
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
      load(chunk);  // write_streams put substitutes in
      append_raw(index, records);
      return;
    }
    uint32_t sum = pairs_checksum(index);
    for (uint32_t patch : patches_) sum += checksum_patch(patch);
    records.push_back(sum);
    records.push_back(static_cast<uint32_t>(patches_.size()) | uint32_t(base) << 16);
    for (int word = 0; word < kLanes / 4; ++word) {
      uint32_t extra = 0;
      for (int i = 0; i < 4; ++i) extra |= uint32_t(bits[4 * word + i] - base) << (8 * i);
      records.push_back(extra);
    }
    const size_t at = records.size();
    records.resize(at + stream_words);
    std::memcpy(records.data() + at, stream_.data(), 4 * stream_words);
    records.insert(records.end(), patches_.begin(), patches_.end());
  }

 private:
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

  void write_sign_mantissa(uint32_t* __restrict out) const {
    for (int i = 0; i < half_steps_ * kHalfStepPairs / 2; ++i) {
      const uint32_t a = pairs_[2 * i] & kSignMantissa, b = pairs_[2 * i + 1] & kSignMantissa;
      out[i] = a | rotl(b, -8);
    }
  }

  // Writes every lane's stream of at least min_bits; returns the number of bits in all.
  int64_t write_streams(int min_bits, std::array<int, kLanes>& bits) {
    const uint32_t* entries = codes_.entries();
    for (int i = 0; i < half_steps_ * kHalfStepPairs; ++i) index_[i] = exponent_index(pairs_[i]);
    uint8_t* out = stream_.data();
    uint64_t window = 0;
    int fill = 0;
    const auto flush = [&] {
      std::memcpy(out, &window, 8);
      out += fill >> 3;
      window >>= fill & ~7;
      fill &= 7;
    };
    int64_t written = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int first = lane % 4 * kTileCols + lane / 4 * kLanePairs;
      for (int half_step = 0; half_step < half_steps_; ++half_step) {
        const int at = half_step * kHalfStepPairs + first;
        uint32_t any = 0;
        for (int i = 0; i < kLanePairs; i += 4) {
          for (int j = i; j < i + 4; ++j) {
            const uint32_t entry = entries[index_[at + j]];
            any |= entry;
            window |= uint64_t{entry & 0xfff} << fill;
            fill += entry >> 12 & 15;
          }
          flush();
        }
        if (any & CodeTable::kUncoded) add_patches(half_step, lane);
      }
      const auto position = [&] { return (out - stream_.data()) * 8 + fill; };
      for (int64_t missing; (missing = written + min_bits - position()) > 0;) {
        fill += static_cast<int>(std::min<int64_t>(missing, 48));
        flush();
      }
      bits[lane] = static_cast<int>(position() - written);
      written = position();
    }
    // The last store wrote the left-over bits and zeros behind them.
    std::memcpy(out, &window, 8);
    return written;
  }

  // Patches the weights of a lane's half-step that substitutes get wrong.
  void add_patches(int half_step, int lane) {
    const int t = lane % 4;
    for (int j = 0; j < kLanePairs; ++j) {
      const int col = lane / 4 * kLanePairs + j;
      uint32_t& pair = pairs_[half_step * kHalfStepPairs + t * kTileCols + col];
      const uint32_t substitute = codes_.substitute(pair);
      const uint32_t position = static_cast<uint32_t>(pair_row(half_step, t)) * kTileCols + col;
      if ((pair ^ substitute) & 0xffff) patches_.push_back(position << 16 | (pair & 0xffff));
      if ((pair ^ substitute) >> 16) {
        patches_.push_back((position + kTileCols) << 16 | pair >> 16);
      }
      pair = substitute;
    }
  }

  void append_raw(int64_t index, std::vector<uint32_t>& records) const {
    records.push_back(pairs_checksum(index));
    records.push_back(kRawChunk);
    for (int i = 0; i < half_steps_ * kHalfStepPairs; i += 2) {
      const auto bytes = [](uint32_t pair) { return (pair >> 7 & 255) | (pair >> 23 & 255) << 8; };
      records.push_back(bytes(pairs_[i]) | bytes(pairs_[i + 1]) << 16);
    }
  }

  uint32_t pairs_checksum(int64_t index) const {
    uint32_t acc[kHalfStepPairs] = {};
    for (int half_step = 0; half_step < half_steps_; ++half_step) {
      const uint32_t* pairs = pairs_ + half_step * kHalfStepPairs;
      for (int i = 0; i < kHalfStepPairs; ++i) acc[i] = checksum_step(acc[i], pairs[i]);
    }
    uint32_t sum = checksum_chunk(index);
    for (int i = 0; i < kHalfStepPairs; ++i) sum += checksum_place(acc[i], i);
    return sum;
  }

  const uint16_t* weights_;
  const View& view_;
  const CodeTable& codes_;
  int half_steps_ = 0;
  uint32_t pairs_[kTileRows * kTileCols / 2];
  uint16_t index_[kTileRows * kTileCols / 2];
  std::vector<uint8_t> stream_;
  std::vector<uint32_t> patches_;
};

// Encodes one slice of view.size weights. The caller provides kCodebookWords,
// chunks() + 1 and sign_mantissa_words() words; the records come back.
inline std::vector<uint32_t> encode_slice(const uint16_t* weights, const View& view, int threads,
                                          uint32_t* codebook, uint32_t* chunk_offsets,
                                          uint32_t* sign_mantissa) {
  const Codebook book = choose_codebook(count_pairs(weights, view, threads));
  book.pack(codebook);
  const CodeTable codes(book);
  const int64_t chunks = view.chunks(), batches = (chunks + kEncodeBatch - 1) / kEncodeBatch;
  std::vector<std::vector<uint32_t>> parts(batches);
  parallel_for(batches, threads, [&](int64_t batch) {
    ChunkEncoder encoder(weights, view, codes);
    const int64_t end = std::min((batch + 1) * kEncodeBatch, chunks);
    for (int64_t c = batch * kEncodeBatch; c < end; ++c) {
      chunk_offsets[c] = static_cast<uint32_t>(parts[batch].size());
      encoder.encode(c, parts[batch], sign_mantissa);
    }
  });
  uint64_t words = 0;
  for (int64_t batch = 0; batch < batches; ++batch) {
    const int64_t end = std::min((batch + 1) * kEncodeBatch, chunks);
    if (words + parts[batch].size() > UINT32_MAX) {
      throw std::length_error("the compressed exponents of one slice exceed 2^32 words");
    }
    for (int64_t c = batch * kEncodeBatch; c < end; ++c) {
      chunk_offsets[c] += static_cast<uint32_t>(words);
    }
    words += parts[batch].size();
  }
  chunk_offsets[chunks] = static_cast<uint32_t>(words);
  std::vector<uint32_t> records;
  records.reserve((words + 3) / 4 * 4);
  for (std::vector<uint32_t>& part : parts) {
    records.insert(records.end(), part.begin(), part.end());
    part = {};
  }
  records.resize((words + 3) / 4 * 4, 0);
  return records;
}

struct EncodedSlice {
  std::vector<uint32_t> codebook, chunk_offsets, exponents, sign_mantissa;
};

inline EncodedSlice encode_slice(const uint16_t* weights, const View& view, int threads) {
  EncodedSlice slice;
  slice.codebook.resize(kCodebookWords);
  slice.chunk_offsets.resize(view.chunks() + 1);
  slice.sign_mantissa.resize(view.sign_mantissa_words());
  slice.exponents = encode_slice(weights, view, threads, slice.codebook.data(),
                                 slice.chunk_offsets.data(), slice.sign_mantissa.data());
  return slice;
}

}  // namespace df11
