// Every compiled instruction set's kernels against the portable ones, without torch: for processors that only an
// emulator has (`make cross`). Numbers are small integers times powers of two, so all sums are exact and all bits must
// be equal.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../capability.h"

namespace {

using namespace dual_lora;

constexpr Dtype kDtypes[] = {Dtype::float32, Dtype::float64, Dtype::bfloat16, Dtype::float16};
constexpr const char* kNames[] = {"float32", "float64", "bfloat16", "float16"};

int64_t size_of(Dtype dtype) { return dtype == Dtype::float64 ? 8 : dtype == Dtype::float32 ? 4 : 2; }

uint32_t state = 1;

int64_t draw(int64_t low, int64_t high) {  // inclusive
  state = state * 1664525u + 1013904223u;
  return low + static_cast<int64_t>(state >> 8) % (high - low + 1);
}

// Aligned memory full of NaN: what is read before it is written shows in the results.
class Memory {
 public:
  explicit Memory(size_t bytes) : bytes_((bytes + 63) / 64 * 64 + 64), data_(std::aligned_alloc(64, bytes_)) {
    std::memset(data_, 0xFF, bytes_);
  }
  ~Memory() { std::free(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* data() const { return data_; }
  bool operator==(const Memory& other) const {
    return bytes_ == other.bytes_ && std::memcmp(data_, other.data_, bytes_) == 0;
  }

 private:
  size_t bytes_;
  void* data_;
};

enum class Layout { dense, transposed, strided };

// A matrix and its memory.
class Owned {
 public:
  Owned(Dtype dtype, int64_t rows, int64_t cols, Layout layout)
      : memory_(static_cast<size_t>(rows * cols * 2 * size_of(dtype))) {
    view = {memory_.data(), dtype, rows, cols, cols, 1};
    if (layout == Layout::transposed) view.row_stride = 1, view.col_stride = rows;
    if (layout == Layout::strided) view.row_stride = 2 * cols, view.col_stride = 2;
  }

  // Values that every dtype holds: integers up to `high` times `step`.
  Owned& fill(int64_t high, double step) {
    for (int64_t i = 0; i < view.rows; ++i)
      for (int64_t j = 0; j < view.cols; ++j) put(i, j, static_cast<double>(draw(-high, high)) * step);
    return *this;
  }

  bool operator==(const Owned& other) const { return memory_ == other.memory_; }

  Matrix view;

 private:
  void put(int64_t i, int64_t j, double value) {
    char* place = static_cast<char*>(view.data) + (i * view.row_stride + j * view.col_stride) * size_of(view.dtype);
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    std::memcpy(&bits, &narrow, sizeof bits);
    if (view.dtype == Dtype::float64) {
      std::memcpy(place, &value, 8);
    } else if (view.dtype == Dtype::float32) {
      std::memcpy(place, &narrow, 4);
    } else {
      uint16_t half = static_cast<uint16_t>(bits >> 16);
      if (view.dtype == Dtype::float16)
        half = static_cast<uint16_t>(
            value == 0 ? 0 : ((bits >> 16) & 0x8000u) | (((bits & 0x7FFFFFFFu) - 0x38000000u) >> 13));
      std::memcpy(place, &half, 2);
    }
  }

  Memory memory_;
};

struct Shape {
  int64_t rows, cols, r1, r2, tokens;
};

struct Options {
  Dtype factors, weight, out, grid, h;
  bool has_weight, dithers, has_bias;
  bool four_bit, nested;  // W0 in four bits, with its absmax quantised
  Layout layout, out_layout;
  Estimator estimator;
  int64_t unit_rows, unit_cols;
};

class PackedMemory {
 public:
  PackedMemory(const KernelTable& kernels, const Factors& factors, bool wide)
      : magnitude_(factors.A.rows, factors, wide, kernels.has_pairs && !wide),
        direction_(factors.C.rows, factors, wide, kernels.has_pairs && !wide),
        view{magnitude_.view(), direction_.view()} {
    for (int64_t strip = 0; strip * kUnitCols < factors.A.cols; ++strip) kernels.pack_strip(factors, wide, strip, view);
    for (int64_t block = 0; block * kRowBlock < factors.B.rows; ++block) kernels.pack_block(factors, wide, block, view);
  }

 private:
  struct PairMemory {
    Memory down, up, down_t, down_pairs, up_pairs;
    bool in_pairs;

    PairMemory(int64_t rank, const Factors& factors, bool wide, bool pairs)
        : down(bytes(down_size(rank, factors.A.cols), wide)),
          up(bytes(up_size(rank, factors.B.rows), wide)),
          down_t(bytes(down_t_size(rank, factors.A.cols), wide)),
          down_pairs(static_cast<size_t>(down_pairs_size(rank, factors.A.cols)) * 2),
          up_pairs(static_cast<size_t>(up_pairs_size(rank, factors.B.rows)) * 2),
          in_pairs(pairs) {}

    PackedPair view() const {
      return {down.data(), up.data(), down_t.data(), in_pairs ? static_cast<uint16_t*>(down_pairs.data()) : nullptr,
              in_pairs ? static_cast<uint16_t*>(up_pairs.data()) : nullptr};
    }
    static size_t bytes(int64_t elements, bool wide) { return static_cast<size_t>(elements) * (wide ? 8 : 4); }
  };

  PairMemory magnitude_, direction_;

 public:
  const Packed view;
};

// What the kernels of one table write, in this order: W, the partial sums, W beside them, Y.
struct Results {
  Owned weight, down, up, second, tokens;

  Results(const Shape& shape, const Options& options, int64_t ranks, int64_t units)
      : weight(options.out, shape.rows, shape.cols, options.out_layout),
        down(options.h == Dtype::float64 ? Dtype::float64 : Dtype::float32, units * ranks, options.unit_cols, Layout::dense),
        up(down.view.dtype, units * options.unit_rows, ranks, Layout::dense),
        second(options.out, shape.rows, shape.cols, options.out_layout),
        tokens(options.out, shape.tokens, shape.rows, options.out_layout) {}
};

template <class F>
void for_each_unit(const Shape& shape, const Options& options, const F& run) {
  int64_t unit = 0;
  for (int64_t row = 0; row < shape.rows; row += options.unit_rows)
    for (int64_t col = 0; col < shape.cols; col += options.unit_cols, ++unit)
      run(unit, Range{row, std::min(options.unit_rows, shape.rows - row), col,
                      std::min(options.unit_cols, shape.cols - col)});
}

// A quantised W0 around a block: rows begin anywhere in a byte and in a block of 32. All numbers are exact.
struct FourBitMemory {
  std::vector<uint8_t> packed, codes;
  std::vector<float> table, absmax, nested_table, nested_absmax;
  FourBit view;

  FourBitMemory(const Shape& shape, Dtype dtype, bool nested) {
    const int64_t row0 = draw(0, 3), col0 = draw(0, 5), row_length = col0 + shape.cols + draw(0, 4);
    const int64_t count = (row0 + shape.rows) * row_length, blocks = count / 32 + 1;
    for (int64_t i = 0; i < (count + 1) / 2; ++i) packed.push_back(static_cast<uint8_t>(draw(0, 255)));
    for (int i = 0; i < 16; ++i) table.push_back(static_cast<float>(i - 8) / 8);
    for (int64_t i = 0; i < blocks; ++i) codes.push_back(static_cast<uint8_t>(draw(0, 255)));
    for (int64_t i = 0; i < blocks; ++i) absmax.push_back(static_cast<float>(draw(1, 4)));
    for (int i = 0; i < 256; ++i) nested_table.push_back(static_cast<float>(i % 4) / 2);
    for (int64_t i = 0; i < blocks / 256 + 1; ++i) nested_absmax.push_back(static_cast<float>(draw(1, 4)));
    view.packed = packed.data(), view.table = table.data(), view.absmax = absmax.data();
    if (nested) view.nested = codes.data();
    view.nested_table = nested_table.data(), view.nested_absmax = nested_absmax.data(), view.nested_offset = 0.5f;
    view.row0 = row0, view.col0 = col0, view.row_length = row_length, view.blocksize = 32, view.nested_blocksize = 256;
    view.dtype = dtype == Dtype::float64 ? Dtype::float32 : dtype;
  }
};

struct Inputs {
  Owned A, B, C, D, weight, h, x, bias;
  FourBitMemory four_bit;
  Factors factors;

  Inputs(const Shape& shape, const Options& o)
      : A(o.factors, shape.r1, shape.cols, o.layout),
        B(o.factors, shape.rows, shape.r1, o.layout),
        C(o.factors, shape.r2, shape.cols, o.layout),
        D(o.factors, shape.rows, shape.r2, o.layout),
        weight(o.weight, shape.rows, shape.cols, o.layout),
        h(o.h, shape.rows, shape.cols, o.layout),
        x(o.out, shape.tokens, shape.cols, o.layout),
        bias(o.weight, 1, shape.rows, o.layout),
        four_bit(shape, o.weight, o.nested),
        // With H in bf16, ∂P and ∂Q are rounded to it where the processor multiplies pairs: 8 bits must be enough.
        factors{o.h == Dtype::bfloat16 ? A.fill(1, 1).view : A.fill(3, 0.5).view,
                o.h == Dtype::bfloat16 ? B.fill(1, 1).view : B.fill(3, 0.5).view,
                C.fill(1, 1).view,
                D.fill(1, 1).view,
                0.0625} {
    weight.fill(64, 1.0 / 64);
    h.fill(3, 1);
    x.fill(3, 1);
    bias.fill(3, 1);
  }
};

void run(const KernelTable& kernels, const Shape& shape, const Options& options, const Inputs& inputs,
         Results& results) {
  const Factors& factors = inputs.factors;
  const bool wide = options.factors == Dtype::float64;
  const PackedMemory packed(kernels, factors, wide), wide_packed(kernels, factors, true);

  const Matrix weight = options.has_weight ? inputs.weight.view : Matrix{};
  const WeightJob job = {factors, packed.view,     results.weight.view, weight, options.grid,
                         3,       int64_t{1} << 33, options.dithers,     true,
                         options.four_bit ? inputs.four_bit.view : FourBit{}};
  const Memory scratch(kernels.weight_scratch(job));
  for_each_unit(shape, options, [&](int64_t, Range range) { kernels.weight(job, range, scratch.data()); });

  const bool wide_sums = options.h == Dtype::float64;
  GradientJob gradient = {job, inputs.h.view, wide_sums, options.h == Dtype::bfloat16 && kernels.has_pairs,
                          packed.view, {options.estimator, 0.5}, true, true};
  gradient.weight_job.out = results.second.view;
  gradient.weight_job.streams = false;
  if (wide_sums) gradient.wide_packed = wide_packed.view;
  const Memory gradient_scratch(kernels.gradient_scratch(gradient));
  const int64_t ranks = padded_ranks(factors), size = wide_sums ? 8 : 4;
  for_each_unit(shape, options, [&](int64_t unit, Range range) {
    char* down = static_cast<char*>(results.down.view.data) + unit * ranks * options.unit_cols * size;
    char* up = static_cast<char*>(results.up.view.data) + unit * ranks * options.unit_rows * size;
    kernels.gradient(gradient, range, {down, options.unit_cols, up}, gradient_scratch.data());
  });

  if (options.grid != options.out || (options.out == Dtype::float64) != wide) return;  // as the operator demands
  TokenJob tokens = {job, inputs.x.view, results.tokens.view, options.has_bias ? inputs.bias.view : Matrix{}};
  tokens.weight_job.out = Matrix{};
  const Memory token_scratch(kernels.token_scratch(tokens));
  for (int64_t row = 0; row < shape.rows; row += kTokenRows)
    kernels.token(tokens, row, std::min(kTokenRows, shape.rows - row), token_scratch.data());
}

int compare(const InstructionSet& set, const InstructionSet& reference) {
  constexpr Shape shapes[] = {{1, 1, 1, 1, 1},     {5, 7, 2, 3, 3},      {16, 16, 4, 4, 4},
                              {17, 33, 5, 1, 1},   {31, 48, 16, 16, 8},  {64, 97, 8, 20, 5},
                              {33, 383, 3, 17, 2}, {40, 400, 33, 7, 16}, {70, 777, 6, 6, 6}};
  int failures = 0;
  int64_t cases = 0;
  for (const Shape& shape : shapes) {
    for (Dtype factor : kDtypes) {
      for (Dtype out : kDtypes) {
        for (int variant = 0; variant < 16; ++variant) {
          Options o;
          o.factors = factor;
          o.out = out;
          o.weight = kDtypes[variant % 4];
          o.h = factor == Dtype::float64 || variant % 3 == 0 ? Dtype::float64 : kDtypes[variant % 3 == 1 ? 0 : variant % 4];
          o.grid = out == Dtype::float32 && variant % 4 > 1 ? kDtypes[variant % 4] : out;
          o.four_bit = variant >= 12;
          o.nested = variant % 2 == 0;
          o.has_weight = variant != 7 && !o.four_bit;
          o.dithers = variant % 3 != 1 && size_of(o.grid) == 2;
          o.has_bias = variant % 5 != 0;
          o.layout = static_cast<Layout>(draw(0, 2));
          o.out_layout = static_cast<Layout>(draw(0, 2));
          o.estimator = static_cast<Estimator>(draw(0, 2));
          o.unit_rows = kRowBlock * draw(1, 4);
          o.unit_cols = draw(0, 1) ? kUnitCols : kUnitCols / 8;
          const Inputs inputs(shape, o);
          const int64_t units =
              ((shape.rows + o.unit_rows - 1) / o.unit_rows) * ((shape.cols + o.unit_cols - 1) / o.unit_cols);
          const int64_t ranks = padded_ranks(inputs.factors);
          Results ours(shape, o, ranks, units), theirs(shape, o, ranks, units);
          run(set.kernels, shape, o, inputs, ours);
          run(reference.kernels, shape, o, inputs, theirs);
          ++cases;
          const char* wrong = !(ours.weight == theirs.weight)   ? "W"
                              : !(ours.down == theirs.down)     ? "sums for A and C"
                              : !(ours.up == theirs.up)         ? "sums for B and D"
                              : !(ours.second == theirs.second) ? "W of the gradients"
                              : !(ours.tokens == theirs.tokens) ? "few tokens"
                                                                : nullptr;
          if (wrong == nullptr) continue;
          ++failures;
          std::printf("%s: %s differ: W [%d, %d], ranks %d and %d, factors %s, weight %s, out %s, variant %d\n",
                      set.name, wrong, static_cast<int>(shape.rows), static_cast<int>(shape.cols),
                      static_cast<int>(shape.r1), static_cast<int>(shape.r2), kNames[static_cast<int>(factor)],
                      kNames[static_cast<int>(o.weight)], kNames[static_cast<int>(out)], variant);
        }
      }
    }
  }
  std::printf("%s against %s: %d of %d cases differ\n", set.name, reference.name, failures, static_cast<int>(cases));
  return failures;
}

}  // namespace

int main() {
  const std::vector<InstructionSet> sets = instruction_sets();
  int failures = 0;
  for (const InstructionSet& set : sets) {
    if (set.runs) failures += compare(set, sets.back());
    else std::printf("%s: not on this processor\n", set.name);
  }
  return failures == 0 ? 0 : 1;
}
