// The FFI handler for the CPU: decodes one published unit on XLA's thread pool.

#include "published/cpu/handler.h"

#include <algorithm>
#include <mutex>
#include <string>
#include <string_view>

#include "common/handler.h"
#include "common/run_items.h"
#include "common/simd.h"
#include "common/words.h"
#include "published/decode.h"
#include "published/operands.h"

namespace df11::published {
namespace {

// A call's unit, and the first problem found in its blocks.
struct Call {
  const Unit unit;
  const CodeTable table;
  std::mutex mutex;
  int64_t failed_item = -1;
  std::string problem;

  explicit Call(const Unit& unit) : unit(unit), table(unit) {}

  void fail(int64_t item, const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (failed_item >= 0 && failed_item <= item) return;
    failed_item = item;
    problem = what;
  }
};

class Worker {
 public:
  explicit Worker(Call& call) : call_(call), decoder_(call.unit, call.table, simd_in_use()) {}

  void operator()(int64_t item) {
    const Unit& unit = call_.unit;
    const int64_t first = item * kItemBlocks, end = std::min(first + kItemBlocks, unit.blocks);
    const std::string problem = decoder_.decode(first, end, 0, unit.size, unit.out);
    if (!problem.empty()) call_.fail(item, problem);
  }

 private:
  Call& call_;
  BlockDecoder decoder_;
};

ffi::Error DecodeUnitImpl(ffi::ThreadPool pool, std::string_view name, ffi::AnyBuffer sign_mantissa,
                          ffi::AnyBuffer encoded_exponent, ffi::AnyBuffer luts,
                          ffi::AnyBuffer output_positions, ffi::AnyBuffer gaps,
                          ffi::Result<ffi::AnyBuffer> out) {
  Unit unit;
  ffi::Error error =
      read_unit(sign_mantissa, encoded_exponent, luts, output_positions, gaps, out, name, unit);
  if (error.failure()) return error;
  const auto corrupt = [&](const std::string& problem) {
    return ffi::Error(ffi::ErrorCode::kDataLoss,
                      "df11_published_decode: '" + std::string(name) + "' is corrupt: " + problem);
  };
  std::string problem = check_tables(unit);
  if (problem.empty()) problem = check_ends(unit);
  if (!problem.empty()) return corrupt(problem);
  expect_large_write(unit.out, 2 * unit.size);
  Call call(unit);
  run_items(pool, (unit.blocks + kItemBlocks - 1) / kItemBlocks, [&] { return Worker(call); });
  if (!call.problem.empty()) return corrupt(call.problem);
  return ffi::Error::Success();
}

}  // namespace

DF11_DEFINE_HANDLER_SYMBOL(df11_published_decode_cpu, DecodeUnitImpl,
                           ffi::Ffi::Bind()
                               .Ctx<ffi::ThreadPool>()
                               .Attr<std::string_view>("name")
                               .Arg<ffi::AnyBuffer>()    // sign_mantissa
                               .Arg<ffi::AnyBuffer>()    // encoded_exponent
                               .Arg<ffi::AnyBuffer>()    // luts
                               .Arg<ffi::AnyBuffer>()    // output_positions
                               .Arg<ffi::AnyBuffer>()    // gaps
                               .Ret<ffi::AnyBuffer>());  // the weights

}  // namespace df11::published
