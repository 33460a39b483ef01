// From XLA's buffers to a Unit: the checks that the CPU and the CUDA handler share.
//
// Operands: sign_mantissa u8[n], encoded_exponent u8[n_bytes], luts u8[rows + 1, 256],
// output_positions u32[blocks or blocks + 1], gaps u8[320 * blocks]. Result: bf16[n]. Attribute
// name: the unit's, for messages.
#pragma once

#include <string>
#include <string_view>

#include "common/operands.h"
#include "published/check.h"
#include "published/layout.h"
#include "xla/ffi/api/ffi.h"

namespace df11::published {

inline ffi::Error operand_error(std::string_view name, const std::string& problem) {
  return ffi::Error::InvalidArgument("df11_published_decode: '" + std::string(name) +
                                     "': " + problem);
}

inline ffi::Error read_unit(ffi::AnyBuffer sign_mantissa, ffi::AnyBuffer encoded_exponent,
                            ffi::AnyBuffer luts, ffi::AnyBuffer output_positions,
                            ffi::AnyBuffer gaps, ffi::Result<ffi::AnyBuffer> out,
                            std::string_view name, Unit& unit) {
  struct Operand {
    const char* name;
    ffi::AnyBuffer buffer;
    ffi::DataType type;
    const char* type_name;
    size_t rank;
  };
  const Operand operands[] = {
      {"sign_mantissa", sign_mantissa, ffi::DataType::U8, "uint8", 1},
      {"encoded_exponent", encoded_exponent, ffi::DataType::U8, "uint8", 1},
      {"luts", luts, ffi::DataType::U8, "uint8", 2},
      {"output_positions", output_positions, ffi::DataType::U32, "uint32", 1},
      {"gaps", gaps, ffi::DataType::U8, "uint8", 1},
      {"the result", *out, ffi::DataType::BF16, "bfloat16", 1},
  };
  for (const Operand& operand : operands) {
    if (operand.buffer.element_type() != operand.type ||
        operand.buffer.dimensions().size() != operand.rank) {
      return operand_error(name, std::string(operand.name) + " must be " + operand.type_name +
                                     " with " + std::to_string(operand.rank) + " axes, got axes " +
                                     describe(operand.buffer.dimensions()));
    }
  }
  const std::string problem = set_sizes(
      unit, sign_mantissa.dimensions()[0], encoded_exponent.dimensions()[0], luts.dimensions()[0],
      luts.dimensions()[1], output_positions.dimensions()[0], gaps.dimensions()[0]);
  if (!problem.empty()) return operand_error(name, problem);
  if ((*out).dimensions()[0] != unit.size) {
    return operand_error(name, entries_problem("the result", (*out).dimensions()[0],
                                               std::to_string(unit.size) + " like sign_mantissa"));
  }
  unit.sign_mantissa = sign_mantissa.typed_data<uint8_t>();
  unit.encoded_exponent = encoded_exponent.typed_data<uint8_t>();
  unit.luts = luts.typed_data<uint8_t>();
  unit.output_positions = output_positions.typed_data<uint32_t>();
  unit.gaps = gaps.typed_data<uint8_t>();
  unit.out = static_cast<uint16_t*>((*out).untyped_data());
  return ffi::Error::Success();
}

}  // namespace df11::published
