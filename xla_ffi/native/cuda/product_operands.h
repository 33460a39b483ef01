// From XLA's buffers to a Product.
//
// Operands: x bf16[ceil(k / 32), rows, 32], in the order that product.h tells, index s32[], then
// for each matrix header, codebook, chunk_offsets, exponents, sign_mantissa as u32[stack, words].
// Results: for each matrix bf16[rows, n] or f32[rows, n], n of product_n, then the workspace
// u32[words], of product_workspace_words. Attributes: names, those of the matrices, one a line;
// headers, the one that the slices of each have to have, but for the codebook's id.
#pragma once

#include <string>
#include <string_view>

#include "native/cuda/product.h"
#include "native/operands.h"

namespace df11::native {

inline ffi::Error read_matrix(ffi::RemainingArgs args, ffi::RemainingRets results, size_t i,
                              const uint32_t* header, const OperandError& error, Product& product) {
  ProductMatrix& matrix = product.matrices[i];
  TensorSlices& slices = matrix.slices;
  Layout layout;
  if (!unpack_header(header, layout)) return error("the header that is expected is none");
  slices.view = make_view(layout);
  slices.geometry = header[kGeometryWord];
  slices.code_bits = layout.code_bits;
  const auto x_dims = args.get<ffi::AnyBuffer>(0)->dimensions();
  if (!can_multiply(slices.view) || round_up(slices.view.k, kXGroup) != x_dims[0] * kXGroup) {
    return error("is no matrix that x " + describe(x_dims) + " can be multiplied with");
  }
  auto out = results.get<ffi::AnyBuffer>(i);
  const auto type = product.float_out ? ffi::DataType::F32 : ffi::DataType::BF16;
  if (!out || (*out)->element_type() != type) {
    return error("the results must all be bfloat16, or all float32");
  }
  const auto dims = (*out)->dimensions();
  const int64_t n = product_n(slices.view);
  if (dims.size() != 2 || dims[0] != product.rows || dims[1] != n) {
    return error("the result has shape " + describe(dims) + ", expected [" +
                 std::to_string(product.rows) + "," + std::to_string(n) + "]");
  }
  matrix.out = (*out)->untyped_data();
  ffi::AnyBuffer::Dimensions payload_dims{};
  if (ffi::Error problem =
          read_payload(args, 2 + kArraysPerTensor * i, 0, error, slices, payload_dims);
      problem.failure()) {
    return problem;
  }
  if (slices.stack == 0) return error("a slice of an empty stack was asked for");
  slices.index = static_cast<const int32_t*>(args.get<ffi::AnyBuffer>(1)->untyped_data());
  return ffi::Error::Success();
}

inline ffi::Error read_product(ffi::RemainingArgs args, ffi::RemainingRets results,
                               std::string_view names, ffi::Span<const uint32_t> headers,
                               Product& product) {
  const auto invalid = [](const std::string& problem) {
    return ffi::Error::InvalidArgument("df11_product: " + problem);
  };
  const size_t count = results.size() < 1 ? 0 : results.size() - 1;
  if (count < 1 || count > kMatricesPerProduct || args.size() != 2 + kArraysPerTensor * count ||
      headers.size() != kHeaderWords * count) {
    return invalid(
        "expected x, an index, and five arrays, a header and a result for each of 1 to " +
        std::to_string(kMatricesPerProduct) + " matrices, and a workspace; got " +
        std::to_string(args.size()) + " operands and " + std::to_string(results.size()) +
        " results");
  }
  const auto x = args.get<ffi::AnyBuffer>(0);
  if (!x || x->element_type() != ffi::DataType::BF16 || x->dimensions().size() != 3 ||
      x->dimensions()[2] != kXGroup) {
    return invalid("operand 0 (x) must be bfloat16[k / 32, rows, 32]");
  }
  const auto index = args.get<ffi::AnyBuffer>(1);
  if (!index || index->element_type() != ffi::DataType::S32 || index->dimensions().size() != 0) {
    return invalid("operand 1 (index) must be int32[]");
  }
  const int64_t rows = x->dimensions()[1];
  if (rows < 1 || rows > kMostProductRows) {
    return invalid("x has " + std::to_string(rows) + " rows, expected 1 to " +
                   std::to_string(kMostProductRows));
  }
  product.x = static_cast<const uint16_t*>(x->untyped_data());
  product.rows = static_cast<int>(rows);
  product.count = static_cast<int>(count);
  auto first = results.get<ffi::AnyBuffer>(0);
  product.float_out = first && (*first)->element_type() == ffi::DataType::F32;
  for (size_t i = 0; i < count; ++i) {
    const OperandError error{names, i, "df11_product"};
    const uint32_t* header = headers.begin() + kHeaderWords * i;
    if (ffi::Error problem = read_matrix(args, results, i, header, error, product);
        problem.failure()) {
      return problem;
    }
  }
  auto workspace = results.get<ffi::AnyBuffer>(count);
  const int64_t words = product_workspace_words(product);
  if (!workspace || (*workspace)->element_type() != ffi::DataType::U32 ||
      (*workspace)->dimensions().size() != 1 || (*workspace)->dimensions()[0] < words) {
    return invalid("the last result (workspace) must be uint32[" + std::to_string(words) + "]");
  }
  product.workspace = static_cast<uint32_t*>((*workspace)->untyped_data());
  return ffi::Error::Success();
}

}  // namespace df11::native
