// Compressed tensors on the device, decoded by the CUDA decoder and compared with the CPU decoder.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "../kernel_driver.h"
#include "encoded_slice.h"
#include "native/codebook.h"
#include "native/cpu/decode_slices.h"
#include "native/cuda/decode.h"
#include "native/pairs.h"

namespace df11::native {

using Array = std::vector<uint32_t>;
using Weights = std::vector<uint16_t>;
using Shape = std::vector<int64_t>;

inline Grouping grouping = Grouping::kBySize;  // of what is decoded

inline constexpr uint16_t kUnwritten = 0x5a5a;
inline constexpr uint16_t kPoison = 0xffff;

// A stack of slices on the host, as a compressed tensor holds it.
struct Payload {
  View view;
  uint32_t geometry = 0;
  int code_bits = 0;
  int64_t slices = 0, exponents_words = 0;
  Array header, codebook, chunk_offsets, exponents, sign_mantissa;
};

inline Payload compress(const Layout& layout, const std::vector<Weights>& slices) {
  Payload payload;
  payload.view = make_view(layout);
  payload.code_bits = layout.code_bits;
  payload.slices = static_cast<int64_t>(slices.size());
  std::vector<EncodedSlice> encoded;
  for (const Weights& weights : slices) {
    encoded.push_back(encode_slice(weights.data(), layout, 1));
    payload.exponents_words =
        std::max(payload.exponents_words, int64_t(encoded.back().exponents.size()));
  }
  const auto append = [](Array& to, const auto& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  for (const EncodedSlice& slice : encoded) {
    Header header = pack_header(layout);
    payload.geometry = header[kGeometryWord];
    const uint64_t id = codebook_id(slice.codebook.data());
    header[kCodebookIdWord] = static_cast<uint32_t>(id);
    header[kCodebookIdWord + 1] = static_cast<uint32_t>(id >> 32);
    append(payload.header, header);
    append(payload.codebook, slice.codebook);
    append(payload.chunk_offsets, slice.chunk_offsets);
    append(payload.exponents, slice.exponents);
    payload.exponents.resize(payload.header.size() / kHeaderWords * payload.exponents_words);
    append(payload.sign_mantissa, slice.sign_mantissa);
  }
  return payload;
}

inline Layout layout_of(const Shape& shape) {
  return default_layout(shape.data(), static_cast<int>(shape.size()));
}
inline Layout layout_of(const Shape& shape, bool along_columns, int steps) {
  Layout layout = layout_of(shape);
  layout.along_columns = along_columns;
  layout.steps = steps;
  return layout;
}

// What a slice should decode to, by the CPU decoder: corrupt chunks are poison.
inline Weights decode_on_cpu(const Payload& payload, int64_t slice) {
  const View& view = payload.view;
  Weights out(view.size, kPoison);
  // The kernel looks at one word of the header.
  const auto decoder = std::make_unique<ChunkDecoder>(best_simd());
  if (payload.header[slice * kHeaderWords + kGeometryWord] != payload.geometry ||
      !decoder->set_slice(
          {view, payload.code_bits, payload.codebook.data() + slice * kCodebookWords,
           payload.chunk_offsets.data() + slice * (view.chunks() + 1),
           payload.exponents.data() + slice * payload.exponents_words, payload.exponents_words,
           payload.sign_mantissa.data() + slice * view.sign_mantissa_words()})) {
    return out;
  }
  std::vector<uint16_t> decoded(view.size);
  for (int64_t c = 0; c < view.chunks(); ++c) {
    ++checked;
    if (!decoder->decode(c, decoded.data())) {
      ++poisoned;
      continue;
    }
    const Chunk chunk = locate_chunk(view, c);
    const Extent extent(view, chunk);
    for (int64_t k = 0; k < extent.k; ++k) {
      for (int64_t n = 0; n < extent.n_of(k); ++n) {
        const int64_t element = chunk.element + k * view.stride_k() + n * view.stride_n();
        out[element] = decoded[element];
      }
    }
  }
  return out;
}

// A tensor of one call: by default one batch element for each index, all of one stack.
struct Operand {
  const Payload* payload;
  std::vector<int32_t> index = {0};
  std::vector<BatchAxis> axes = {};
  int64_t stack = 0;  // 0: all of the payload's slices
  size_t exponents_offset = 0, out_offset = 0;
  bool bands = false;  // these are counted by the index
};

// An operand's copy on the device.
struct DeviceOperand {
  explicit DeviceOperand(const Operand& operand)
      : operand(operand),
        header(operand.payload->header),
        codebook(operand.payload->codebook),
        chunk_offsets(operand.payload->chunk_offsets),
        exponents(operand.payload->exponents, operand.exponents_offset),
        sign_mantissa(operand.payload->sign_mantissa),
        index(operand.index),
        out(Weights(batch() * slices(nullptr).size(), kUnwritten), operand.out_offset) {}

  std::vector<BatchAxis> axes() const {
    if (!operand.axes.empty()) return operand.axes;
    return {{static_cast<int64_t>(operand.index.size()), 0, 1}};
  }
  int64_t batch() const {
    int64_t batch = 1;
    for (const BatchAxis& axis : axes()) batch *= axis.size;
    return batch;
  }
  // As the kernel finds it in device memory, but on the host.
  int64_t slice_of(int64_t b) const {
    TensorSlices on_host = slices();
    on_host.index = operand.index.data();
    return on_host.slice_of(b);
  }
  TensorSlices slices() const { return slices(out.get()); }
  TensorSlices slices(uint16_t* result) const {
    TensorSlices slices;
    slices.view = operand.payload->view;
    if (operand.bands) slices.bands = slices.view.batch * slices.view.tiles_n();
    slices.geometry = operand.payload->geometry;
    slices.code_bits = operand.payload->code_bits;
    slices.stack = operand.stack ? operand.stack : operand.payload->slices;
    slices.stack *= std::max(slices.bands, 1);
    slices.batch = batch();
    slices.exponents_words = operand.payload->exponents_words;
    slices.index = index.get();
    slices.header = header.get();
    slices.codebook = codebook.get();
    slices.chunk_offsets = chunk_offsets.get();
    slices.exponents = exponents.get();
    slices.sign_mantissa = sign_mantissa.get();
    slices.out = result;
    for (const BatchAxis& axis : axes()) slices.axes[slices.batch_axes++] = axis;
    return slices;
  }

  Operand operand;
  Buffer<uint32_t> header, codebook, chunk_offsets, exponents, sign_mantissa;
  Buffer<int32_t> index;
  Buffer<uint16_t> out;
};

// Decodes the operands in one call; returns what came out, operand by operand.
inline std::vector<Weights> decode(const std::vector<Operand>& operands) {
  std::vector<std::unique_ptr<DeviceOperand>> device;
  std::vector<TensorSlices> tensors;
  for (const Operand& operand : operands) {
    device.push_back(std::make_unique<DeviceOperand>(operand));
    tensors.push_back(device.back()->slices());
  }
  const cudaError_t error =
      launch_decode(nullptr, tensors.data(), static_cast<int>(tensors.size()), grouping);
  expect(error == cudaSuccess, "launch_decode returned " + std::to_string(error));
  expect(cudaDeviceSynchronize() == cudaSuccess, "cudaDeviceSynchronize");
  std::vector<Weights> out;
  for (const auto& operand : device) out.push_back(operand->out.copy());
  return out;
}

// Expects each batch element to be the slice it should be, as the CPU decodes it, which
// should be `original` where that is given.
inline void check(const std::string& name, const std::vector<Operand>& operands,
                  const std::vector<const std::vector<Weights>*>& originals = {}) {
  const std::vector<Weights> decoded = decode(operands);
  for (size_t i = 0; i < operands.size(); ++i) {
    const DeviceOperand device(operands[i]);
    const TensorSlices slices = device.slices();
    const int64_t size = slices.size();
    for (int64_t b = 0; b < slices.batch; ++b) {
      const int64_t slice = device.slice_of(b);
      const Weights got(decoded[i].begin() + b * size, decoded[i].begin() + (b + 1) * size);
      const std::string which =
          name + ", tensor " + std::to_string(i) + ", batch element " + std::to_string(b);
      if (slice < 0) {
        expect(got == Weights(size, kUnwritten), which + " is written");
        continue;
      }
      const ChunkRange range = slices.range_of(slice);
      // Of the rows that a band does not have, nothing is written.
      const auto take = [&](const Weights& all) {
        Weights part(size, kUnwritten);
        const int64_t matrix = slices.view.k * slices.view.n;
        const int64_t end = slices.bands ? (range.element / matrix + 1) * matrix : size;
        const int64_t count = std::min(size, end - range.element);
        std::copy_n(all.begin() + range.element, count, part.begin());
        return part;
      };
      const Weights expected = take(decode_on_cpu(*operands[i].payload, range.slice));
      for (int64_t e = 0; e < size; ++e) {
        if (got[e] == expected[e]) continue;
        char text[80];
        std::snprintf(text, sizeof text, ": element %lld is %04x, should be %04x",
                      static_cast<long long>(e), got[e], expected[e]);
        expect(false, which + text);
        break;
      }
      if (originals.empty()) continue;
      expect(got == take((*originals[i])[range.slice]), which + ": not the original");
    }
  }
}

}  // namespace df11::native
