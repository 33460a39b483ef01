// Tests of the CUDA decoder against the CPU decoder and the weights that were encoded.
// Compiled by g++ against ../emulation (test_kernel_emulated.py) it runs the
// kernels on the host, those for older GPUs, too; compiled by nvcc, on a GPU.
//
//     kernel_test [ROUNDS of damage] [the only SECTION to run]
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "../thread_sanitizer.h"
#include "device_payload.h"

namespace df11::native {
namespace {

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
// In both orders of pairs and with all numbers of steps a chunk, if slow with one, in turn.
void round_trip(const std::string& name, const Shape& shape,
                const std::function<uint16_t()>& draw) {
  static int turn = 0;
  for (const bool along_columns : {false, true}) {
    for (const int steps : {8, 4, 2}) {
      if (kIsSlow && turn++ % 5 != 0) continue;
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

// Codes of more bits than the header allows, behind slices of the same codebook that may have them.
void test_longest_codes() {
  for (const Shape& shape : {Shape{256, 256}, Shape{16387}}) {
    Layout layout = layout_of(shape);
    const std::vector<Weights> weights = {fill(size_of(shape), normal)};
    const Payload sound = compress(layout, weights);
    Payload wrong = sound;
    wrong.code_bits = layout.code_bits = 11;
    wrong.geometry = wrong.header[kGeometryWord] = pack_header(layout)[kGeometryWord];
    const std::vector<Operand> operands = {{&sound}, {&wrong}, {&sound}};
    check("longest codes", operands);
    const std::vector<Weights> out = decode(operands);
    expect(out[0] == weights[0] && out[2] == weights[0], "codes are as long as they may be");
    expect(out[1] == Weights(size_of(shape), kPoison), "codes longer than allowed are decoded");
  }
}

// Single bands of a matrix, and of a batch of them: some are raw, some corrupt, and the last of a
// matrix lacks rows.
void test_bands() {
  const int64_t k = kIsSlow ? 250 : 1000;
  for (const Shape& shape : {Shape{k, 144}, Shape{3, k, 144}, Shape{7, 64, 208}}) {
    Layout layout = layout_of(shape, true, 4);
    layout.batch_axes = static_cast<int>(shape.size()) - 2;
    layout.row_axes = 1;
    const View view = make_view(layout);
    expect(!view.is_flat, "the view is not flat");
    const int64_t bands = view.batch * view.tiles_n();
    int64_t at = 0;
    std::vector<Weights> slices;
    for (int i = 0; i < 2; ++i) {
      slices.push_back(fill(
          view.size, [&] { return at++ / (64 * view.k) % 3 == 1 ? any_bits() : mostly_normal(); }));
    }
    Payload payload = compress(layout, slices);
    const auto last = static_cast<int32_t>(2 * bands - 1);
    Operand operand{&payload, {4, -1, 0, last, last + 9, 3, static_cast<int32_t>(bands), -7, 1}};
    operand.bands = true;
    check("bands", {operand}, {&slices});
    payload.sign_mantissa[payload.view.sign_mantissa_words() - 1] ^= 1;
    payload.chunk_offsets.back() += 4;
    check("bands, corrupt", {operand});
    payload.header[kHeaderWords + kGeometryWord] ^= 1;
    check("bands of a slice with a wrong header", {operand});
  }
}

// What the decoder for groups of chunks meets: several groups a warp, of several slices, with and
// without patches, and among them chunks that are raw, long, corrupt, at an edge or alone.
void test_groups() {
  struct Case {
    Shape shape;
    int steps;
  };
  // The last tile of k not full; odd numbers of tiles along n; the last of them not full.
  std::vector<Case> cases = {{{208, 512}, 2}, {{200, 448}, 4}, {{384, 328}, 8}, {{16, 2048}, 2}};
  if (!kIsSlow) {
    cases.insert(cases.end(), {{{512, 512}, 8}, {{384, 640}, 4}, {{96, 1352}, 2}, {{112, 128}, 8}});
  }
  std::vector<Payload> payloads;
  std::vector<std::vector<Weights>> weights;
  for (const Case& c : cases) {
    int64_t at = 0;
    const int64_t cols = c.shape[1];
    const auto draw = [&]() -> uint16_t {
      // Some tiles are raw, or their exponents take 4 bits each.
      const int64_t tile = at / cols / (16 * c.steps) * (cols / 64) + at % cols / 64;
      ++at;
      return tile % 13 == 5 ? any_bits() : tile % 11 == 7 ? sixteen_exponents() : mostly_normal();
    };
    weights.push_back({fill(size_of(c.shape), draw), fill(size_of(c.shape), normal)});
    payloads.push_back(compress(layout_of(c.shape, false, c.steps), weights.back()));
  }
  std::vector<Operand> operands;
  std::vector<const std::vector<Weights>*> originals;
  for (size_t i = 0; i < cases.size(); ++i) {
    operands.push_back({&payloads[i], {0, 1, -1, 1, 0}});
    originals.push_back(&weights[i]);
  }
  check("groups", operands, originals);
  // Of one slice each: blocks take its groups in turn, alone and beside other tensors.
  std::vector<Operand> single;
  for (size_t i = 0; i < cases.size(); ++i) {
    single.push_back({&payloads[i], {static_cast<int32_t>(i % 2)}});
    if (!kIsSlow) check("groups of one tensor", {single[i]}, {originals[i]});
  }
  check("groups of one slice each", single, originals);
  // One chunk of each slice is corrupt: after its weights have been stored.
  for (Payload& payload : payloads) {
    for (int64_t slice = 0; slice < payload.slices; ++slice) {
      const int64_t words = payload.view.sign_mantissa_words();
      payload.sign_mantissa[slice * words + random_below(words)] ^= 1 << random_below(32);
    }
  }
  check("groups, corrupt", operands);
  // Patches that are not sorted by step.
  Payload unsorted = compress(layout_of({256, 128}, false, 4), {fill(256 * 128, mostly_normal)});
  for (int64_t chunk = 0; chunk < unsorted.view.chunks(); ++chunk) {
    const uint32_t begin = unsorted.chunk_offsets[chunk], end = unsorted.chunk_offsets[chunk + 1];
    const uint32_t patches = unsorted.exponents[begin + 1] & 0xffff;
    expect(patches > 20, "there are many patches");
    std::swap(unsorted.exponents[end - 1], unsorted.exponents[end - patches]);
  }
  const Weights out = decode({{&unsorted}})[0], sorted = decode_on_cpu(unsorted, 0);
  for (size_t e = 0; e < out.size(); ++e) {
    if (out[e] != sorted[e] && out[e] != kPoison) expect(false, "unsorted patches are not noticed");
  }
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
                                   {layout_of({128, 144}, true, 4), mostly_normal},
                                   {layout_of({128, 384}, false, 2), mostly_normal},
                                   {layout_of({256, 256}), normal}};
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
  using namespace df11::native;
  const int rounds = argc > 1 ? std::atoi(argv[1]) : df11::kDraws;
  const std::string only = argc > 2 ? argv[2] : "";
  const auto run = [&](const char* name, const std::function<void()>& test) {
    if (only.empty() || only == name) df11::section(name, "chunks", test);
  };
  const auto run_all = [&] {
    run("values", test_values);
    run("shapes", test_shapes);
    run("stacks", test_stacks);
    run("longest codes", test_longest_codes);
    run("bands", test_bands);
    run("groups", test_groups);
    run("alignment", test_alignment);
    run("many tensors", test_many_tensors);
    run("launches", test_launches);
    run("damage", [&] { test_damage(rounds); });
  };
#ifdef __CUDACC__
  // Few launches here are of so many chunks that a GPU takes two at a time.
  for (const Grouping each : {Grouping::kSingle, Grouping::kPairs}) {
    grouping = each;
    run_all();
  }
#else
  run_all();
  grouping = Grouping::kSingle;
  run("groups of one chunk", test_groups);
  run("damage to them", [&] { test_damage((rounds + 3) / 4); });
  std::printf("As on an older GPU:\n");
  cuda_emulation::compute_capability = 8;
  if (only != "groups") run_all();
#endif
  std::printf("%d failures\n", df11::failures);
  return df11::failures != 0;
}
