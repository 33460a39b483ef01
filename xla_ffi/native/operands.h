// From XLA's buffers to TensorSlices: the checks that the CPU and the CUDA handler share.
//
// Operands: index s32[batch...], then for each tensor header, codebook, chunk_offsets,
// exponents, sign_mantissa as u32[batch..., stack, words]; a batch axis is 1 where its operand
// was not batched. Results: bf16[batch..., slice...], or, where the index counts bands,
// bf16[batch..., 64, k]. Attributes: names, those of the tensors, one a line; headers, the one that
// the slices of each tensor have to have, but for the codebook's id.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "common/operands.h"
#include "native/tensor_slices.h"
#include "xla/ffi/api/ffi.h"

namespace df11::native {

inline constexpr int kArraysPerTensor = 5;

// The name of tensor i for messages: its line in `names`, or its number.
inline std::string tensor_name(std::string_view names, size_t i) {
  size_t begin = 0;
  for (size_t line = 0; line < i && begin != std::string_view::npos; ++line) {
    begin = names.find('\n', begin);
    if (begin != std::string_view::npos) ++begin;
  }
  if (begin == std::string_view::npos || begin >= names.size())
    return "tensor " + std::to_string(i);
  return "'" + std::string(names.substr(begin, names.find('\n', begin) - begin)) + "'";
}

// Makes the error for tensor i of a call. Every call makes one of these, few make an error: the
// text is put together only then.
struct OperandError {
  std::string_view names;
  size_t tensor;
  std::string_view call = "df11_decode";

  ffi::Error operator()(const std::string& problem) const {
    return ffi::Error::InvalidArgument(std::string(call) + ": " + tensor_name(names, tensor) +
                                       ": " + problem);
  }
};

// Fills `axes` from the batch dimensions of the result, the payload and the index.
inline bool set_batch_axes(TensorSlices& tensor, ffi::AnyBuffer::Dimensions out,
                           ffi::AnyBuffer::Dimensions payload, ffi::AnyBuffer::Dimensions index) {
  const int batch_rank = static_cast<int>(index.size());
  int64_t payload_stride = 1, index_stride = 1;
  std::vector<BatchAxis> axes;  // innermost first
  for (int i = batch_rank - 1; i >= 0; --i) {
    if ((payload[i] != 1 && payload[i] != out[i]) || (index[i] != 1 && index[i] != out[i])) {
      return false;
    }
    tensor.batch *= out[i];
    if (out[i] != 1) {
      const BatchAxis axis{out[i], payload[i] == 1 ? 0 : payload_stride,
                           index[i] == 1 ? 0 : index_stride};
      // Neighbours along which the same operands move are one axis.
      if (!axes.empty() && (axes.back().payload_stride == 0) == (axis.payload_stride == 0) &&
          (axes.back().index_stride == 0) == (axis.index_stride == 0)) {
        axes.back().size *= axis.size;
      } else {
        axes.push_back(axis);
      }
    }
    payload_stride *= payload[i];
    index_stride *= index[i];
  }
  if (axes.size() > kMaxBatchAxes) return false;
  tensor.batch_axes = static_cast<int>(axes.size());
  for (size_t i = 0; i < axes.size(); ++i) tensor.axes[axes.size() - 1 - i] = axes[i];
  return true;
}

// Fills in where the payload of `tensor`, whose view is known, is: the five arrays from operand
// `first` on, which have batch_rank axes before the stack's.
inline ffi::Error read_payload(ffi::RemainingArgs args, size_t first, size_t batch_rank,
                               const OperandError& error, TensorSlices& tensor,
                               ffi::AnyBuffer::Dimensions& payload_dims) {
  static constexpr const char* kArrayNames[kArraysPerTensor] = {
      "header", "codebook", "chunk_offsets", "exponents", "sign_mantissa"};
  const int64_t expected_words[kArraysPerTensor] = {kHeaderWords, kCodebookWords,
                                                    tensor.view.chunks() + 1, -1,
                                                    tensor.view.sign_mantissa_words()};
  const uint32_t* data[kArraysPerTensor];
  for (int k = 0; k < kArraysPerTensor; ++k) {
    const auto array = args.get<ffi::AnyBuffer>(first + k);
    if (!array || array->element_type() != ffi::DataType::U32) {
      return error(std::string(kArrayNames[k]) + " must be uint32");
    }
    const auto dims = array->dimensions();
    if (dims.size() != batch_rank + 2) {
      return error(std::string(kArrayNames[k]) + " has shape " + describe(dims) +
                   ", expected [batch..., stack, words] with " + std::to_string(batch_rank) +
                   " batch axes");
    }
    if (k == 0) payload_dims = dims;
    if (!std::equal(dims.begin(), dims.end() - 1, payload_dims.begin())) {
      return error(std::string(kArrayNames[k]) + " has shape " + describe(dims) +
                   ", which disagrees in its leading axes with header " + describe(payload_dims));
    }
    const int64_t words = dims[dims.size() - 1];
    if (expected_words[k] >= 0 ? words != expected_words[k] : words % 4 != 0) {
      return error(std::string(kArrayNames[k]) + " has " + std::to_string(words) +
                   " words a slice, expected " +
                   (expected_words[k] >= 0 ? std::to_string(expected_words[k])
                                           : std::string("a multiple of 4")) +
                   " for a slice of " + std::to_string(tensor.view.size) + " weights");
    }
    data[k] = static_cast<const uint32_t*>(array->untyped_data());
    if (k == 3) tensor.exponents_words = words;
  }
  tensor.stack = payload_dims[batch_rank] * std::max(tensor.bands, 1);
  tensor.header = data[0];
  tensor.codebook = data[1];
  tensor.chunk_offsets = data[2];
  tensor.exponents = data[3];
  tensor.sign_mantissa = data[4];
  return ffi::Error::Success();
}

inline ffi::Error read_operands(ffi::RemainingArgs args, ffi::RemainingRets results,
                                std::string_view names, ffi::Span<const uint32_t> headers,
                                std::vector<TensorSlices>& tensors) {
  if (args.size() != 1 + kArraysPerTensor * results.size()) {
    return ffi::Error::InvalidArgument(
        "df11_decode: expected an index and five arrays for each of " +
        std::to_string(results.size()) + " results, got " + std::to_string(args.size()) +
        " operands");
  }
  const auto index = args.get<ffi::AnyBuffer>(0);
  if (!index || index->element_type() != ffi::DataType::S32) {
    return ffi::Error::InvalidArgument("df11_decode: operand 0 (index) must be int32");
  }
  const size_t batch_rank = index->dimensions().size();
  if (headers.size() != kHeaderWords * results.size()) {
    return ffi::Error::InvalidArgument("df11_decode: expected a header for each result");
  }

  for (size_t i = 0; i < results.size(); ++i) {
    const OperandError error{names, i};
    auto out = results.get<ffi::AnyBuffer>(i);
    if (!out || (*out)->element_type() != ffi::DataType::BF16) {
      return error("the result must be bfloat16");
    }
    const auto out_dims = (*out)->dimensions();
    if (out_dims.size() < batch_rank || out_dims.size() - batch_rank > kMaxDims) {
      return error("the result " + describe(out_dims) + " must have the " +
                   std::to_string(batch_rank) + " batch axes of the index and at most " +
                   std::to_string(kMaxDims) + " more");
    }
    TensorSlices tensor;
    Layout layout;
    const bool is_header = unpack_header(headers.begin() + kHeaderWords * i, layout);
    if (is_header) tensor.view = make_view(layout);
    const View& view = tensor.view;
    const int64_t band[] = {kTileCols, view.k}, bands = view.batch * view.tiles_n();
    const auto is_result = [&](const int64_t* dims, int ndim) {
      return std::equal(out_dims.begin() + batch_rank, out_dims.end(), dims, dims + ndim);
    };
    const bool are_slices = is_header && is_result(layout.dims, layout.ndim);
    const bool are_bands = view.along_columns && bands <= INT32_MAX && is_result(band, 2);
    if (!are_slices && !are_bands) {
      return error("the header that is expected is not of the result " + describe(out_dims));
    }
    if (!are_slices) tensor.bands = static_cast<int32_t>(bands);
    tensor.geometry = headers[kHeaderWords * i + kGeometryWord];
    tensor.code_bits = layout.code_bits;

    ffi::AnyBuffer::Dimensions payload_dims{};
    if (ffi::Error problem =
            read_payload(args, 1 + kArraysPerTensor * i, batch_rank, error, tensor, payload_dims);
        problem.failure()) {
      return problem;
    }
    if (!set_batch_axes(tensor, out_dims, payload_dims, index->dimensions())) {
      return error("batch axes of result " + describe(out_dims) + ", payload " +
                   describe(payload_dims) + " and index " + describe(index->dimensions()) +
                   " disagree, or there are more than " + std::to_string(kMaxBatchAxes) +
                   " that alternate");
    }
    if (tensor.stack == 0 && tensor.batch > 0)
      return error("a slice of an empty stack was asked for");
    tensor.index = static_cast<const int32_t*>(index->untyped_data());
    tensor.out = static_cast<uint16_t*>((*out)->untyped_data());
    tensors.push_back(tensor);
  }
  return ffi::Error::Success();
}

}  // namespace df11::native
