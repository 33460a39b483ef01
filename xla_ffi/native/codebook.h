// The code over pairs of exponents: chosen from counts, written, checked, expanded
// into the 12-bit look-up table. Host only; docs/format.md, section "codebook".
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "native/layout.h"

namespace df11::native {

// FNV-1a of the codebook's bytes, by which slices with equal codebooks know each other.
inline uint64_t codebook_id(const uint32_t* words) {
  uint64_t id = 0xcbf29ce484222325u;
  for (int i = 0; i < 4 * kCodebookWords; ++i) {
    id = (id ^ (words[i / 4] >> (8 * (i % 4)) & 255)) * 0x100000001b3u;
  }
  return id;
}

struct Codebook {
  std::array<uint8_t, kCodedExponents> exponents{};
  std::array<uint8_t, kSymbols> lengths{};

  static Codebook unpack(const uint32_t* words) {
    Codebook book;
    for (int i = 0; i < kCodedExponents; ++i) book.exponents[i] = words[i / 4] >> (8 * (i % 4));
    words += kCodedExponents / 4;
    for (int i = 0; i < kSymbols; ++i) book.lengths[i] = words[i / 8] >> (4 * (i % 8)) & 15;
    return book;
  }

  void pack(uint32_t* words) const {
    std::fill_n(words, kCodebookWords, 0u);
    for (int i = 0; i < kCodedExponents; ++i) {
      words[i / 4] |= uint32_t{exponents[i]} << (8 * (i % 4));
    }
    words += kCodedExponents / 4;
    for (int i = 0; i < kSymbols; ++i) words[i / 8] |= uint32_t{lengths[i]} << (4 * (i % 8));
  }
};

// Lengths of an optimal prefix code of at most `most_bits` bits for the symbols with
// a count (at least two): package-merge, Larmore and Hirschberg 1990.
inline void limited_lengths(const std::array<uint64_t, kSymbols>& counts, int most_bits,
                            std::array<uint8_t, kSymbols>& lengths) {
  struct Package {
    uint64_t weight;
    int symbol;       // of a leaf, else -1
    int left, right;  // of a package
  };
  std::vector<Package> nodes;
  for (int i = 0; i < kSymbols; ++i) {
    if (counts[i]) nodes.push_back({counts[i], i, -1, -1});
  }
  std::stable_sort(nodes.begin(), nodes.end(),
                   [](const Package& a, const Package& b) { return a.weight < b.weight; });
  const int leaves = static_cast<int>(nodes.size());
  std::vector<int> level, merged;
  const auto merge_leaves = [&] {  // the leaves and `level`, both sorted, into `merged`
    merged.clear();
    size_t package = 0;
    for (int leaf = 0; leaf < leaves || package < level.size();) {
      const bool take_leaf = package == level.size() ||
                             (leaf < leaves && nodes[leaf].weight <= nodes[level[package]].weight);
      merged.push_back(take_leaf ? leaf++ : level[package++]);
    }
  };
  for (int bits = 1; bits < most_bits; ++bits) {
    merge_leaves();
    level.clear();
    for (size_t i = 0; i + 1 < merged.size(); i += 2) {
      level.push_back(static_cast<int>(nodes.size()));
      nodes.push_back(
          {nodes[merged[i]].weight + nodes[merged[i + 1]].weight, -1, merged[i], merged[i + 1]});
    }
  }
  merge_leaves();
  lengths.fill(0);
  std::vector<int> open(merged.begin(), merged.begin() + 2 * leaves - 2);
  while (!open.empty()) {
    const Package node = nodes[open.back()];
    open.pop_back();
    if (node.symbol >= 0) {
      ++lengths[node.symbol];
    } else {
      open.push_back(node.left);
      open.push_back(node.right);
    }
  }
}

// The codebook for pairs counted as counts[exponent of weight k << 8 | of weight k + 1], with codes
// of at most `most_bits` bits.
inline Codebook choose_codebook(const std::vector<uint32_t>& counts, int most_bits) {
  std::array<uint64_t, 256> exponent_counts{};
  uint64_t total = 0;
  for (int first = 0; first < 256; ++first) {
    const uint32_t* row = counts.data() + (first << 8);
    uint64_t row_total = 0;
    for (int second = 0; second < 256; ++second) {
      exponent_counts[second] += row[second];
      row_total += row[second];
    }
    exponent_counts[first] += row_total;
    total += row_total;
  }
  std::array<int, 256> order;
  for (int i = 0; i < 256; ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return exponent_counts[a] > exponent_counts[b]; });

  Codebook book;
  std::array<uint64_t, kSymbols> symbol_counts{};
  int coded = 0;
  for (int i = 0; i < kCodedExponents; ++i) {
    if (exponent_counts[order[i]]) book.exponents[i] = static_cast<uint8_t>(order[i]);
    for (int j = 0; j < kCodedExponents; ++j) {
      // A code of 12 bits takes 2^-12 of the code space, which costs all other pairs
      // 3.5e-4 bits; a patch costs about 30 bits. So a pair rarer than about 2^-17 is
      // better patched; and sooner where codes are shorter.
      const uint64_t count = counts[order[i] << 8 | order[j]];
      if (count > total >> (most_bits + 5)) symbol_counts[kCodedExponents * i + j] = count;
      coded += symbol_counts[kCodedExponents * i + j] != 0;
    }
  }
  // A complete code has at least two symbols.
  for (int i = 0; coded < 2; ++i) {
    if (!symbol_counts[i]) {
      symbol_counts[i] = 1;
      ++coded;
    }
  }
  limited_lengths(symbol_counts, most_bits, book.lengths);
  return book;
}

// The codes, bit-reversed as they go into the stream; false if the code is not complete.
inline bool assign_codes(const Codebook& book, std::array<uint16_t, kSymbols>& codes) {
  std::array<uint32_t, 16> next{};
  for (int i = 0; i < kSymbols; ++i) {
    if (book.lengths[i] > kMaxCodeBits) return false;
    ++next[book.lengths[i]];
  }
  uint32_t first = 0;
  for (int bits = 1; bits <= kMaxCodeBits; ++bits) {
    const uint32_t count = next[bits];
    first <<= 1;
    next[bits] = first;
    first += count;
    if (first > 1u << bits) return false;
  }
  if (first != kTableSize) return false;
  for (int i = 0; i < kSymbols; ++i) {
    const int bits = book.lengths[i];
    if (!bits) continue;
    const uint32_t code = next[bits]++;
    uint32_t reversed = 0;
    for (int b = 0; b < bits; ++b) reversed |= (code >> b & 1) << (bits - 1 - b);
    codes[i] = static_cast<uint16_t>(reversed);
  }
  return true;
}

// Fills the table of kTableSize entries, each the symbol that its bits begin with above the length
// of its code, a byte each; false if the codebook is corrupt.
inline bool build_table(const Codebook& book, uint16_t* table) {
  std::array<uint16_t, kSymbols> codes{};
  if (!assign_codes(book, codes)) return false;
  for (int i = 0; i < kSymbols; ++i) {
    const int bits = book.lengths[i];
    if (!bits) continue;
    for (uint32_t at = codes[i]; at < kTableSize; at += 1u << bits) {
      table[at] = static_cast<uint16_t>(i << 8 | bits);
    }
  }
  return true;
}

}  // namespace df11::native
