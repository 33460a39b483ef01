// The FFI handler for the CPU: decodes a set of tensors on XLA's thread pool.

#include "native/cpu/handler.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "common/handler.h"
#include "common/run_items.h"
#include "common/simd.h"
#include "common/words.h"
#include "native/cpu/decode_slices.h"
#include "native/operands.h"

namespace df11::native {
namespace {

// Chunks that a thread takes at a time: 128 K weights, tens of microseconds.
constexpr int64_t kChunksPerItem = 16;

std::atomic<int64_t> decode_counter{0};

std::string corruption(std::string_view names, size_t tensor, const std::string& what) {
  return "df11_decode: " + tensor_name(names, tensor) + " is corrupt: " + what;
}

// A call's tensors, and the first problem found.
struct Call {
  std::vector<TensorSlices> tensors;
  std::vector<int64_t> first_item;  // of each tensor, and the end
  std::mutex mutex;
  int64_t failed_item = -1;
  std::string problem;

  void fail(int64_t item, size_t tensor, const std::string& names, const std::string& what) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (failed_item >= 0 && failed_item <= item) return;
    failed_item = item;
    problem = corruption(names, tensor, what);
  }
};

SlicePayload slice_payload(const TensorSlices& tensor, int64_t slice) {
  return {tensor.view,
          tensor.code_bits,
          tensor.codebook + slice * kCodebookWords,
          tensor.chunk_offsets + slice * (tensor.view.chunks() + 1),
          tensor.exponents + slice * tensor.exponents_words,
          tensor.exponents_words,
          tensor.sign_mantissa + slice * tensor.view.sign_mantissa_words()};
}

// One thread's part in a call: keeps the table of the slice it is at.
class Worker {
 public:
  Worker(Call& call, const std::string& names)
      : call_(call), names_(names), decoder_(simd_in_use()) {}
  ~Worker() { ChunkDecoder::finish(); }

  void operator()(int64_t item) {
    size_t at = 0;
    while (item >= call_.first_item[at + 1]) ++at;
    const TensorSlices& tensor = call_.tensors[at];
    const int64_t chunks = tensor.chunks();
    const int64_t items_per_slice = (chunks + kChunksPerItem - 1) / kChunksPerItem;
    const int64_t batch = (item - call_.first_item[at]) / items_per_slice;
    const int64_t first = (item - call_.first_item[at]) % items_per_slice * kChunksPerItem;
    const int64_t number = tensor.slice_of(batch);
    if (number < 0) return;
    const ChunkRange range = tensor.range_of(number);
    if (tensor_ != &tensor || slice_ != range.slice) {
      tensor_ = &tensor;
      slice_ = range.slice;
      usable_ = decoder_.set_slice(slice_payload(tensor, range.slice));
    }
    const std::string where = " of slice " + std::to_string(range.slice);
    if (!usable_) return call_.fail(item, at, names_, "the codebook" + where);
    uint16_t* out = tensor.out + batch * tensor.size() - range.element;
    for (int64_t i = first; i < std::min(first + kChunksPerItem, chunks); ++i) {
      const int64_t chunk = range.first + i * range.stride;
      if (!decoder_.decode(chunk, out)) {
        return call_.fail(item, at, names_, "chunk " + std::to_string(chunk) + where);
      }
    }
  }

 private:
  Call& call_;
  const std::string& names_;
  ChunkDecoder decoder_;
  const TensorSlices* tensor_ = nullptr;
  int64_t slice_ = -1;
  bool usable_ = false;
};

ffi::Error DecodeCpuImpl(ffi::ThreadPool pool, std::string_view names_attribute,
                         ffi::Span<const uint32_t> headers, ffi::RemainingArgs args,
                         ffi::RemainingRets results) {
  const std::string names(names_attribute);
  Call call;
  if (ffi::Error error = read_operands(args, results, names, headers, call.tensors);
      error.failure()) {
    return error;
  }
  call.first_item.push_back(0);
  for (size_t i = 0; i < call.tensors.size(); ++i) {
    const TensorSlices& tensor = call.tensors[i];
    for (int64_t b = 0; b < tensor.batch; ++b) {
      const int64_t number = tensor.slice_of(b);
      if (number < 0) continue;
      const int64_t slice = tensor.range_of(number).slice;
      const std::string problem =
          check_header(tensor.header + slice * kHeaderWords, headers.begin() + i * kHeaderWords);
      if (!problem.empty()) {
        return ffi::Error(ffi::ErrorCode::kDataLoss,
                          corruption(names, i, "slice " + std::to_string(slice) + " " + problem));
      }
      ++decode_counter;
    }
    expect_large_write(tensor.out, 2 * tensor.batch * tensor.size());
    const int64_t items = (tensor.chunks() + kChunksPerItem - 1) / kChunksPerItem;
    call.first_item.push_back(call.first_item.back() + tensor.batch * items);
  }
  if (call.first_item.back() == 0) return ffi::Error::Success();
  run_items(pool, call.first_item.back(), [&] { return Worker(call, names); });
  if (call.failed_item >= 0) return ffi::Error(ffi::ErrorCode::kDataLoss, call.problem);
  return ffi::Error::Success();
}

}  // namespace

int64_t decode_count() { return decode_counter; }

DF11_DEFINE_HANDLER_SYMBOL(df11_decode_cpu, DecodeCpuImpl,
                           ffi::Ffi::Bind()
                               .Ctx<ffi::ThreadPool>()
                               .Attr<std::string_view>("names")
                               .Attr<ffi::Span<const uint32_t>>("headers")
                               .RemainingArgs()    // index, then five arrays a tensor
                               .RemainingRets());  // the tensors

}  // namespace df11::native
