// Tests of the CUDA decoder against the CPU decoder and the weights that were encoded.
// Compiled by g++ against ../emulation (test_kernel_emulated.py) it runs the
// kernel on host threads; compiled by nvcc, on a GPU.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../kernel_driver.h"
#include "encoded_slice.h"
#include "native/codebook.h"
#include "native/cpu/decode_slices.h"
#include "native/cuda/decode.h"

namespace df11::native {
namespace {

using Array = std::vector<uint32_t>;
using Weights = std::vector<uint16_t>;
using Shape = std::vector<int64_t>;

constexpr uint16_t kUnwritten = 0x5a5a;
constexpr uint16_t kPoison = 0xffff;

// A stack of slices on the host, as a compressed tensor holds it.
struct Payload {
  View view;
  uint32_t geometry = 0;
  int64_t slices = 0, exponents_words = 0;
  Array header, codebook, chunk_offsets, exponents, sign_mantissa;
};

Payload compress(const Layout& layout, const std::vector<Weights>& slices) {
  Payload payload;
  payload.view = make_view(layout);
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

Layout layout_of(const Shape& shape) {
  return default_layout(shape.data(), static_cast<int>(shape.size()));
}
Layout layout_of(const Shape& shape, bool along_columns, int steps) {
  Layout layout = layout_of(shape);
  layout.along_columns = along_columns;
  layout.steps = steps;
  return layout;
}

// What a slice should decode to, by the CPU decoder: corrupt chunks are poison.
Weights decode_on_cpu(const Payload& payload, int64_t slice) {
  const View& view = payload.view;
  Weights out(view.size, kPoison);
  // The kernel looks at one word of the header.
  const auto decoder = std::make_unique<ChunkDecoder>(best_simd());
  if (payload.header[slice * kHeaderWords + kGeometryWord] != payload.geometry ||
      !decoder->set_slice({view, payload.codebook.data() + slice * kCodebookWords,
                           payload.chunk_offsets.data() + slice * (view.chunks() + 1),
                           payload.exponents.data() + slice * payload.exponents_words,
                           payload.exponents_words,
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
        out(Weights(batch() * operand.payload->view.size, kUnwritten), operand.out_offset) {}

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
  TensorSlices slices() const {
    TensorSlices slices;
    slices.view = operand.payload->view;
    slices.geometry = operand.payload->geometry;
    slices.stack = operand.stack ? operand.stack : operand.payload->slices;
    slices.batch = batch();
    slices.exponents_words = operand.payload->exponents_words;
    slices.index = index.get();
    slices.header = header.get();
    slices.codebook = codebook.get();
    slices.chunk_offsets = chunk_offsets.get();
    slices.exponents = exponents.get();
    slices.sign_mantissa = sign_mantissa.get();
    slices.out = out.get();
    for (const BatchAxis& axis : axes()) slices.axes[slices.batch_axes++] = axis;
    return slices;
  }

  Operand operand;
  Buffer<uint32_t> header, codebook, chunk_offsets, exponents, sign_mantissa;
  Buffer<int32_t> index;
  Buffer<uint16_t> out;
};

// Decodes the operands in one call; returns what came out, operand by operand.
std::vector<Weights> decode(const std::vector<Operand>& operands) {
  std::vector<std::unique_ptr<DeviceOperand>> device;
  std::vector<TensorSlices> tensors;
  for (const Operand& operand : operands) {
    device.push_back(std::make_unique<DeviceOperand>(operand));
    tensors.push_back(device.back()->slices());
  }
  const cudaError_t error =
      launch_decode(nullptr, tensors.data(), static_cast<int>(tensors.size()));
  expect(error == cudaSuccess, "launch_decode returned " + std::to_string(error));
  expect(cudaDeviceSynchronize() == cudaSuccess, "cudaDeviceSynchronize");
  std::vector<Weights> out;
  for (const auto& operand : device) out.push_back(operand->out.copy());
  return out;
}

// Expects each batch element to be the slice it should be, as the CPU decodes it, which
// should be `original` where that is given.
void check(const std::string& name, const std::vector<Operand>& operands,
           const std::vector<const std::vector<Weights>*>& originals = {}) {
  const std::vector<Weights> decoded = decode(operands);
  for (size_t i = 0; i < operands.size(); ++i) {
    const DeviceOperand device(operands[i]);
    const TensorSlices slices = device.slices();
    const int64_t size = slices.view.size;
    for (int64_t b = 0; b < slices.batch; ++b) {
      const int64_t slice = device.slice_of(b);
      const Weights got(decoded[i].begin() + b * size, decoded[i].begin() + (b + 1) * size);
      const std::string which =
          name + ", tensor " + std::to_string(i) + ", batch element " + std::to_string(b);
      if (slice < 0) {
        expect(got == Weights(size, kUnwritten), which + " is written");
        continue;
      }
      const Weights expected = decode_on_cpu(*operands[i].payload, slice);
      for (int64_t e = 0; e < size; ++e) {
        if (got[e] == expected[e]) continue;
        char text[80];
        std::snprintf(text, sizeof text, ": element %lld is %04x, should be %04x",
                      static_cast<long long>(e), got[e], expected[e]);
        expect(false, which + text);
        break;
      }
      if (!originals.empty()) expect(got == (*originals[i])[slice], which + ": not the original");
    }
  }
}

// Weights

Weights fill(int64_t size, const std::function<uint16_t()>& draw) {
  Weights weights(size);
  for (uint16_t& weight : weights) weight = draw();
  return weights;
}
uint16_t any_bits() { return static_cast<uint16_t>(rng()); }
// 16 exponents alike: 4 bits each, so that records do not fit in the staging buffer.
uint16_t sixteen_exponents() {
  return static_cast<uint16_t>((100 + random_below(16)) << 7 | (rng() & 0x807f));
}
// One weight in 64 needs a patch.
uint16_t mostly_normal() { return random_below(64) ? normal() : any_bits(); }

int64_t size_of(const Shape& shape) {
  int64_t size = 1;
  for (int64_t dim : shape) size *= dim;
  return size;
}

void round_trip_of(const std::string& name, const Layout& layout,
                   const std::function<uint16_t()>& draw) {
  const std::vector<Weights> slices = {fill(make_view(layout).size, draw)};
  const Payload payload = compress(layout, slices);
  check(name, {{&payload}}, {&slices});
}
// In both orders of pairs and with all numbers of steps a chunk.
void round_trip(const std::string& name, const Shape& shape,
                const std::function<uint16_t()>& draw) {
  for (const bool along_columns : {false, true}) {
    for (const int steps : {8, 4, 2}) {
      const std::string how = std::string(along_columns ? ", along columns, " : ", ") +
                              std::to_string(steps) + " steps a chunk";
      round_trip_of(name + how, layout_of(shape, along_columns, steps), draw);
    }
  }
}

// Sections

void test_values() {
  round_trip("normal", {256, 192}, normal);
  round_trip("uniform bits", {256, 128}, any_bits);
  round_trip("sixteen exponents", {144, 128}, sixteen_exponents);
  round_trip("sixteen exponents, flat", {8195}, sixteen_exponents);
  round_trip("many patches", {256, 128}, mostly_normal);
  for (uint16_t constant : {0x0000, 0x8000, 0x3f80, 0x7f80, 0xffff}) {
    round_trip("constant", {64, 64}, [=] { return constant; });
  }
  uint16_t next = 0;
  round_trip("all patterns", {512, 128}, [&] { return next++; });
  round_trip("all patterns, flat", {65536}, [&] { return next++; });
  int64_t at = 0;  // some chunks are raw, others not
  round_trip("mixed", {256, 128}, [&] { return at++ / 16384 ? any_bits() : normal(); });
}

void test_shapes() {
  for (int64_t size : {0, 1, 7, 8, 63, 64, 65, 1023, 1024, 1025, 8191, 8192, 8193}) {
    round_trip("flat " + std::to_string(size), {size}, normal);
  }
  for (int64_t rows : {15, 16, 17, 127, 128, 129}) {
    for (int64_t cols : {56, 64, 72, 128}) {
      round_trip(std::to_string(rows) + " x " + std::to_string(cols), {rows, cols}, mostly_normal);
    }
  }
  // Tiles at the right and the lower edge that are not full.
  round_trip("16 x 3144", {16, 3144}, normal);
  round_trip("1599 x 64", {1599, 64}, mostly_normal);
  round_trip("16 x 3144, uniform bits", {16, 3144}, any_bits);
  round_trip("scalar", {}, normal);
  round_trip("three dimensions", {2, 64, 64}, normal);
}

void test_stacks() {
  std::vector<Weights> slices;
  const Shape shape = {33, 40};
  for (int i = 0; i < 4; ++i) slices.push_back(fill(size_of(shape), i % 2 ? normal : any_bits));
  const Payload payload = compress(layout_of(shape), slices);
  check("index, clamped", {{&payload, {2, 0, -7, 3, 99, 1, 1}}}, {&slices});
  check("no slice", {{&payload, {-1, 2, -1}}, {&payload, {-1}}}, {&slices, &slices});
  // A matrix with batch axes, as experts are.
  Layout batched = layout_of({3, 40, 72});
  batched.batch_axes = batched.row_axes = 1;
  round_trip_of("batch of matrices", batched, mostly_normal);
  batched.along_columns = true;
  batched.steps = 2;
  round_trip_of("batch of matrices, along columns", batched, mostly_normal);
  // Slices with one codebook between them: the table is kept, and one whose id is wrong is found.
  Payload shared = compress(layout_of(shape), {slices[1], slices[1], slices[1]});
  const std::vector<Weights> same(3, slices[1]);
  check("one codebook", {{&shared, {0, 1, 2, -1, 1}}}, {&same});
  // Two stacks of two slices: an axis that moves the payload, one that moves the index,
  // one that moves neither.
  check("batch axes", {{&payload, {1, 0, 5}, {{2, 1, 0}, {3, 0, 1}, {2, 0, 0}}, 2}}, {&slices});
  // Outputs of odd size: every second one is not aligned.
  const std::vector<Weights> odd = {fill(8195, normal), fill(8195, mostly_normal)};
  const Payload odd_payload = compress(layout_of({8195}), odd);
  check("odd size", {{&odd_payload, {0, 1, 0}}}, {&odd});
}

void test_alignment() {
  const std::vector<Weights> slices = {fill(130 * 128, mostly_normal)};
  const Payload payload = compress(layout_of({130, 128}), slices);
  check("unaligned exponents", {{&payload, {0}, {}, 0, 1, 0}}, {&slices});
  check("unaligned output", {{&payload, {0}, {}, 0, 0, 3}}, {&slices});
  DeviceOperand device({&payload});
  TensorSlices tensor = device.slices();
  ++tensor.sign_mantissa;
  expect(launch_decode(nullptr, &tensor, 1) == cudaErrorMisalignedAddress,
         "unaligned sign_mantissa is refused");
}

void test_many_tensors() {
  const std::vector<Shape> shapes = {{100}, {0}, {64, 64}, {7}, {33, 72}};
  std::vector<std::vector<Weights>> weights;
  std::vector<Payload> payloads;
  for (int i = 0; i < 45; ++i) {
    const Shape& shape = shapes[i % shapes.size()];
    weights.push_back({fill(size_of(shape), normal), fill(size_of(shape), any_bits)});
    payloads.push_back(compress(layout_of(shape), weights.back()));
  }
  std::vector<Operand> operands;
  std::vector<const std::vector<Weights>*> originals;
  for (int i = 0; i < 45; ++i) {
    operands.push_back({&payloads[i], {i % 2}});
    originals.push_back(&weights[i]);
  }
  check("many tensors", operands, originals);
  check("no tensors", {});
}

// However many small tensors there are, one launch serves 17 of them; and what is launched can be
// captured in a CUDA graph, which finds its index in device memory whenever it runs.
void test_launches() {
  const Shape shape = {64, 64};
  const std::vector<Weights> slices = {fill(size_of(shape), normal), fill(size_of(shape), normal)};
  const Payload payload = compress(layout_of(shape), slices),
                empty = compress(layout_of({0}), {{}, {}});
  for (const int count : {0, 1, 7, 17, 18, 35}) {
    std::vector<std::unique_ptr<DeviceOperand>> device;
    std::vector<TensorSlices> tensors;
    for (int i = 0; i < count; ++i) {
      for (const Payload* p : {&payload, &empty}) {  // what is empty does not count
        device.push_back(std::make_unique<DeviceOperand>(Operand{p}));
        tensors.push_back(device.back()->slices());
      }
    }
    const std::string name = std::to_string(count) + " tensors: ";
    Recording recording([&](cudaStream_t stream) {
      return launch_decode(stream, tensors.data(), static_cast<int>(tensors.size()));
    });
    for (const int32_t slice : {0, 1}) {
      for (const auto& operand : device) operand->index.set({slice});
      const int launches = recording.run(), expected = (count + 16) / 17;
      expect(launches == expected,
             name + std::to_string(launches) + " launches, should be " + std::to_string(expected));
      for (int i = 0; i < count; ++i) {
        expect(device[2 * i]->out.copy() == slices[slice],
               name + "tensor " + std::to_string(i) + " is not slice " + std::to_string(slice));
        ++checked;
      }
    }
  }
}

// Damages a payload somewhere.
void damage(Payload& payload) {
  Array* const arrays[] = {&payload.header, &payload.codebook, &payload.chunk_offsets,
                           &payload.exponents, &payload.sign_mantissa};
  Array& array = *arrays[random_below(5)];
  if (array.empty()) return;
  const size_t at = random_below(array.size());
  switch (random_below(6)) {
    case 0:
      array[at] = static_cast<uint32_t>(rng());
      break;
    case 1:
      array[at] = static_cast<uint32_t>(random_below(3) - 1);  // -1, 0, 1
      break;
    case 2: {  // an offset, absurd or not quite right
      Array& offsets = payload.chunk_offsets;
      const uint32_t offset = static_cast<uint32_t>(random_below(2) ? rng() : rng() % 2048);
      offsets[random_below(offsets.size())] = offset;
      break;
    }
    case 3: {  // a record's counts or lane lengths
      const uint64_t at = payload.chunk_offsets[random_below(payload.chunk_offsets.size())] +
                          random_below(kRecordHeaderWords);
      if (at < payload.exponents.size()) payload.exponents[at] = static_cast<uint32_t>(rng());
      break;
    }
    case 4: {  // the end is missing
      const int64_t words = random_below(payload.exponents_words + 1) / 4 * 4;
      payload.exponents_words = words;
      payload.exponents.resize(words);
      break;
    }
    default:
      array[at] ^= 1u << random_below(32);
  }
}

void test_damage(int rounds) {
  // Shapes with few chunks, of each kind of record.
  struct Case {
    Layout layout;
    std::function<uint16_t()> draw;
  };
  const std::vector<Case> cases = {{layout_of({144, 128}), normal},
                                   {layout_of({3000}), mostly_normal},
                                   {layout_of({32, 128}), any_bits},
                                   {layout_of({128, 64}), sixteen_exponents},
                                   {layout_of({72, 144}, true, 4), mostly_normal}};
  std::vector<Weights> originals;
  std::vector<Payload> sound;
  for (const Case& c : cases) {
    originals.push_back(fill(make_view(c.layout).size, c.draw));
    sound.push_back(compress(c.layout, {originals.back()}));
  }
  for (int round = 0; round < rounds; ++round) {
    std::vector<Payload> payloads = sound;
    std::vector<Operand> operands;
    for (Payload& payload : payloads) {
      for (uint64_t i = 0; i <= random_below(3); ++i) damage(payload);
      operands.push_back({&payload});
    }
    check("damage, round " + std::to_string(round), operands);
    for (size_t i = 0; i < payloads.size(); ++i) {
      const Weights decoded = decode_on_cpu(payloads[i], 0);
      bool right_or_poison = true;
      for (size_t e = 0; e < decoded.size(); ++e) {
        right_or_poison &= decoded[e] == originals[i][e] || decoded[e] == kPoison;
      }
      expect(right_or_poison, "damage goes undetected, round " + std::to_string(round));
    }
  }
}

}  // namespace
}  // namespace df11::native

int main(int argc, char** argv) {
  int device;
  if (cudaGetDevice(&device) != cudaSuccess) {
    std::printf("no GPU\n");
    return 2;
  }
  const int rounds = argc > 1 ? std::atoi(argv[1]) : 100;
  using namespace df11::native;
  df11::section("values", "chunks", test_values);
  df11::section("shapes", "chunks", test_shapes);
  df11::section("stacks", "chunks", test_stacks);
  df11::section("alignment", "chunks", test_alignment);
  df11::section("many tensors", "chunks", test_many_tensors);
  df11::section("launches", "chunks", test_launches);
  df11::section("damage", "chunks", [&] { test_damage(rounds); });
  std::printf("%d failures\n", df11::failures);
  return df11::failures != 0;
}
