// The operators that PyTorch sees: tensors into jobs, jobs into units, units onto threads.
//
// Built against PyTorch's stable ABI: one binary serves every torch ≥ 2.11 and every Python (docs/decisions.md).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <vector>

#include "capability.h"
#include "views.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dual_lora {
namespace {

// ---- units onto threads

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// A thread's scratch, kept between calls: fresh pages cost more than the kernels' arithmetic on small layers.
void* thread_scratch(size_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t size = 0;
  if (size < bytes) {
    const size_t lines = (bytes + 63) / 64 * 64;
    memory.reset(std::aligned_alloc(64, lines));
    size = memory ? lines : 0;
    if (!memory) throw std::bad_alloc();
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), size);  // the last job parted it in its own way (scratch.h)
#endif
  return memory.get();
}

// A block cut into units: `chunks` of rows times `strips` of columns.
struct Grid {
  int64_t rows, cols, unit_rows, unit_cols;

  int64_t strips() const { return count(cols, unit_cols); }
  int64_t chunks() const { return count(rows, unit_rows); }
  int64_t units() const { return strips() * chunks(); }
  Range range(int64_t chunk, int64_t strip) const {
    const int64_t row = chunk * unit_rows, col = strip * unit_cols;
    return {row, std::min(unit_rows, rows - row), col, std::min(unit_cols, cols - col)};
  }
};

// Units of kUnitCols columns, with rows to make at least `units` of them in a large block: fewer rows load the factors'
// columns into cache more often, more leave cores without work. At least `fewest` rows.
Grid grid_of(const Factors& factors, int64_t units, int64_t fewest) {
  const int64_t rows = factors.B.rows, cols = factors.A.cols;
  const int64_t wanted = count(rows * count(cols, kUnitCols), units);
  return {rows, cols, std::max(fewest, count(wanted, kRowBlock) * kRowBlock), kUnitCols};
}

// Multiply-adds up to which a second thread is left alone: it takes 10 µs to begin, 50 where it sleeps between regions
// (OMP_WAIT_POLICY), and these are done in 30.
constexpr int64_t kLittleWork = int64_t{1} << 20;

// Calls run(begin, end) on ranges of 0 … count, which cost `work` multiply-adds altogether.
template <class F>
void share(int64_t count, int64_t grain, int64_t work, const F& run) {
  if (work <= kLittleWork) run(int64_t{0}, count);
  else torch::stable::parallel_for(0, count, grain, run);
}

template <class F>
void for_each_unit(int64_t units, size_t scratch, int64_t work, const F& run) {
  share(units, 1, work, [&](int64_t begin, int64_t end) {
    void* memory = thread_scratch(scratch);
    for (int64_t unit = begin; unit < end; ++unit) run(unit, memory);
  });
}

// Of P and Q of a whole block; the contractions take twice as many.
int64_t product_work(const Factors& factors) {
  return factors.B.rows * factors.A.cols * (factors.A.rows + factors.C.rows);
}

bool is_wide(const Factors& factors) { return factors.A.dtype == Dtype::float64; }

// What the factors are packed for.
enum class Use { weight, gradient, gradient_in_pairs };

// The factors packed for the kernels, and the memory that holds them: one tensor, since each costs about half a
// microsecond. Every part is a whole number of cache lines.
class PackedFactors {
 public:
  PackedFactors(const Factors& factors, bool wide, Use use)
      : memory_(torch::stable::empty({place(factors, wide, use, nullptr)}, ScalarType::Byte)) {
    place(factors, wide, use, static_cast<char*>(memory_.data_ptr()));
    const int64_t strips = count(factors.A.cols, kUnitCols), blocks = count(factors.B.rows, kRowBlock);
    const KernelTable& kernels = instruction_set().kernels;
    const int64_t elements = (factors.A.rows + factors.C.rows) * (factors.A.cols + factors.B.rows);
    share(strips + blocks, 16, elements * 8, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        if (part < strips) kernels.pack_strip(factors, wide, part, view);
        else kernels.pack_block(factors, wide, part - strips, view);
      }
    });
  }

  Packed view;

 private:
  // Sets the view to parts of `memory`, one after the other; how many bytes they take.
  int64_t place(const Factors& factors, bool wide, Use use, char* memory) {
    int64_t used = 0;
    const auto part = [&](int64_t elements, int64_t bytes_each, bool needed) {
      char* const from = needed && memory != nullptr ? memory + used : nullptr;
      if (needed) used += elements * bytes_each;
      return from;
    };
    const int64_t rows = factors.B.rows, cols = factors.A.cols, bytes = wide ? 8 : 4;
    for (const bool is_magnitude : {true, false}) {
      const int64_t rank = is_magnitude ? factors.A.rows : factors.C.rows;
      PackedPair& pair = is_magnitude ? view.magnitude : view.direction;
      const bool in_pairs = use == Use::gradient_in_pairs;
      pair.down = part(down_size(rank, cols), bytes, true);
      pair.up = part(up_size(rank, rows), bytes, true);
      pair.down_t = part(down_t_size(rank, cols), bytes, use == Use::gradient);
      pair.down_pairs = reinterpret_cast<uint16_t*>(part(down_pairs_size(rank, cols), 2, in_pairs));
      pair.up_pairs = reinterpret_cast<uint16_t*>(part(up_pairs_size(rank, rows), 2, in_pairs));
    }
    return used;
  }

  Tensor memory_;
};

// Outputs from this size on are written past the caches: reading their lines before they are overwritten made
// generating W 1.3 times as long. Smaller ones are still there when the matrix product reads them.
constexpr int64_t kStreamedElements = int64_t{1} << 20;

// ---- operators

// The grid that W is rounded to. Its storage has the same dtype, or is fp32 where that is narrower.
Dtype rounding_grid(ScalarType grid, const Tensor& out) {
  const bool is_wider = out.scalar_type() == ScalarType::Float && (grid == ScalarType::BFloat16 || grid == ScalarType::Half);
  STD_TORCH_CHECK(grid == out.scalar_type() || is_wider, "grid: got ", name_of(grid), ", expected out's dtype, ",
                  name_of(out.scalar_type()), ", or a 16-bit one for out in float32");
  return dtype_of(grid, "grid");
}

void effective_weight(const Tensor& out, const Tensors& weight, const std::vector<int64_t>& layout,
                      const Tensors& tensors, ScalarType rounded_to, const OptionalOrigin& dither) {
  const Factors factors = factors_of(tensors);
  WeightJob job = weight_job(matrix(out, "out"), base_of(weight, layout, factors), factors,
                             rounding_grid(rounded_to, out), dither);
  check_shape(job.out, "out", factors.B.rows, factors.A.cols);
  const PackedFactors packed(factors, is_wide(factors), Use::weight);
  job.packed = packed.view;
  job.streams = job.out.rows * job.out.cols >= kStreamedElements && job.out.data != job.weight.data;
  const KernelTable& kernels = instruction_set().kernels;
  const Grid grid = grid_of(factors, 128, kRowBlock);
  for_each_unit(grid.units(), kernels.weight_scratch(job), product_work(factors), [&](int64_t unit, void* scratch) {
    kernels.weight(job, grid.range(unit / grid.strips(), unit % grid.strips()), scratch);
  });
}

// Partial sums of one gradient: the first of `count`, which lie `stride` apart and are added in their order.
template <class T>
struct PartialSums {
  const T* first;
  int64_t row_stride, count, stride;
};

// Adds partial sums to a range of a gradient, if that is wanted.
template <class T>
void add_partials(const Matrix& gradient, Range range, PartialSums<T> partials) {
  constexpr int64_t kAtOnce = 64;  // columns summed side by side
  if (gradient.data == nullptr) return;
  for (int64_t i = 0; i < range.rows; ++i) {
    for (int64_t start = 0; start < range.cols; start += kAtOnce) {
      const int64_t piece = std::min(kAtOnce, range.cols - start);
      T totals[kAtOnce] = {};
      for (int64_t part = 0; part < partials.count; ++part) {
        const T* from = partials.first + part * partials.stride + i * partials.row_stride + start;
        for (int64_t j = 0; j < piece; ++j) totals[j] += from[j];
      }
      T* to = static_cast<T*>(gradient.data) + (range.row + i) * gradient.row_stride +
              (range.col + start) * gradient.col_stride;
      for (int64_t j = 0; j < piece; ++j) to[j * gradient.col_stride] += totals[j];
    }
  }
}

struct GradientTargets {
  Matrix A, B, C, D;
};

Matrix gradient_target(const OptionalTensor& gradient, const char* name, const Matrix& factor, const Tensor& h) {
  const ScalarType sums = h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  const Matrix target = matrix(gradient, name);
  if (!gradient.has_value()) return target;
  check_shape(target, name, factor.rows, factor.cols);
  STD_TORCH_CHECK(gradient->scalar_type() == sums, name, ": got ", name_of(gradient->scalar_type()), ", expected ",
                  name_of(sums), " for h of ", name_of(h.scalar_type()));
  return target;
}

// A rectangle of units, whose partial sums are in memory at once: `down` of every unit, then `up` of every unit.
struct Section {
  int64_t chunk, chunks, strip, strips;
};

int64_t partial_size(const Grid& grid, int64_t ranks) { return ranks * (grid.unit_cols + grid.unit_rows); }

// Runs a section's units, then adds their partial sums to the gradients.
template <class T>
void run_section(const GradientJob& job, const GradientTargets& targets, const Grid& grid, const Section& section,
                 T* memory) {
  const KernelTable& kernels = instruction_set().kernels;
  const Factors& factors = job.weight_job.factors;
  const int64_t ranks = padded_ranks(factors), magnitude = padded_rank(factors.A.rows), strips = section.strips;
  const int64_t down_size = ranks * grid.unit_cols, up_size = ranks * grid.unit_rows;
  const int64_t units = section.chunks * strips;
  T* ups = memory + units * down_size;
  const auto range = [&](int64_t chunk, int64_t strip) {
    return grid.range(section.chunk + chunk, section.strip + strip);
  };
  const int64_t work = units * grid.unit_rows * grid.unit_cols * ranks;
  for_each_unit(units, kernels.gradient_scratch(job), 3 * work, [&](int64_t unit, void* scratch) {
    kernels.gradient(job, range(unit / strips, unit % strips),
                     {memory + unit * down_size, grid.unit_cols, ups + unit * up_size}, scratch);
  });
  for_each_unit(strips + section.chunks, 0, units * partial_size(grid, ranks), [&](int64_t part, void*) {
    if (part < strips) {  // A and C of one strip, over the chunks
      const Range own = range(0, part);
      const PartialSums<T> down = {memory + part * down_size, grid.unit_cols, section.chunks, strips * down_size};
      PartialSums<T> direction = down;
      direction.first += magnitude * grid.unit_cols;
      add_partials(targets.A, {0, factors.A.rows, own.col, own.cols}, down);
      add_partials(targets.C, {0, factors.C.rows, own.col, own.cols}, direction);
    } else {  // B and D of one chunk, over the strips
      const int64_t chunk = part - strips;
      const Range own = range(chunk, 0);
      const PartialSums<T> up = {ups + chunk * strips * up_size, ranks, strips, up_size};
      PartialSums<T> direction = up;
      direction.first += magnitude;
      add_partials(targets.B, {own.row, own.rows, 0, factors.A.rows}, up);
      add_partials(targets.D, {own.row, own.rows, 0, factors.C.rows}, direction);
    }
  });
}

// Adds to `gradients` (of A, B, C and D) what H contributes. Writes W in the same sweep if `weight_part` has an output.
void sweep(const WeightJob& weight_part, const Tensor& h, const OptionalTensor* gradients, StraightThrough ste,
           int64_t workspace) {
  const Factors& factors = weight_part.factors;
  const Matrix h_view = matrix(h, "h");
  check_shape(h_view, "h", factors.B.rows, factors.A.cols);
  STD_TORCH_CHECK(h_view.dtype == Dtype::float64 || !is_wide(factors), "h: got ", name_of(h.scalar_type()),
                  ", expected float64, which float64 factors need");
  const int64_t estimator = static_cast<int64_t>(ste.estimator);
  STD_TORCH_CHECK(estimator >= 0 && estimator <= 2, "estimator: got ", estimator, ", expected 0, 1 or 2");
  const GradientTargets targets = {
      gradient_target(gradients[0], "grad_A", factors.A, h), gradient_target(gradients[1], "grad_B", factors.B, h),
      gradient_target(gradients[2], "grad_C", factors.C, h), gradient_target(gradients[3], "grad_D", factors.D, h)};
  const int64_t ranks = padded_ranks(factors), size = h_view.dtype == Dtype::float64 ? 8 : 4;
  Grid grid = grid_of(factors, 32, 4 * kRowBlock);  // each unit writes sums of its own
  if (grid.units() == 0) return;
  while (partial_size(grid, ranks) * size > workspace && grid.unit_cols > 64) grid.unit_cols /= 2;
  const bool is_mixed = size == 8 && !is_wide(factors);
  const bool in_pairs = h_view.dtype == Dtype::bfloat16 && instruction_set().kernels.has_pairs;
  const Use use = is_mixed ? Use::weight : in_pairs ? Use::gradient_in_pairs : Use::gradient;
  const PackedFactors packed(factors, is_wide(factors), use);
  std::optional<PackedFactors> wide_packed;
  if (is_mixed) wide_packed.emplace(factors, true, Use::gradient);
  GradientJob job = {weight_part, h_view, size == 8, in_pairs, is_mixed ? wide_packed->view : packed.view, ste};
  job.weight_job.packed = packed.view;
  job.magnitude = targets.A.data != nullptr || targets.B.data != nullptr;
  job.direction = targets.C.data != nullptr || targets.D.data != nullptr;
  const int64_t at_once = workspace / std::max<int64_t>(1, partial_size(grid, ranks) * size);  // without a rank: none
  const int64_t strips = std::clamp<int64_t>(at_once, 1, grid.strips());
  const int64_t chunks = std::clamp<int64_t>(at_once / strips, 1, grid.chunks());
  const Tensor memory = torch::stable::empty({chunks * strips * partial_size(grid, ranks)},
                                             size == 8 ? ScalarType::Double : ScalarType::Float);
  for (int64_t chunk = 0; chunk < grid.chunks(); chunk += chunks) {
    for (int64_t strip = 0; strip < grid.strips(); strip += strips) {
      const Section section = {chunk, std::min(chunks, grid.chunks() - chunk), strip,
                               std::min(strips, grid.strips() - strip)};
      if (size == 8) run_section(job, targets, grid, section, static_cast<double*>(memory.data_ptr()));
      else run_section(job, targets, grid, section, static_cast<float*>(memory.data_ptr()));
    }
  }
}

void factor_gradients(const Tensor& h, const Tensors& tensors, const OptionalTensor& column_weights,
                      const std::vector<OptionalTensor>& gradients, int64_t estimator, double clip_bound,
                      int64_t workspace) {
  WeightJob no_weight = {};
  no_weight.factors = factors_of(tensors);
  if (column_weights.has_value())
    no_weight.factors.column_weights =
        elements<float>(*column_weights, "column_weights", ScalarType::Float, no_weight.factors.A.cols);
  STD_TORCH_CHECK(gradients.size() == 4, "gradients: got ", gradients.size(), ", expected those of A, B, C and D");
  sweep(no_weight, h, gradients.data(), {static_cast<Estimator>(estimator), clip_bound}, workspace);
}

void weight_and_factor_gradients(const std::vector<OptionalTensor>& results, const Tensors& weight,
                                 const std::vector<int64_t>& layout, const Tensor& h, const Tensors& tensors,
                                 ScalarType rounded_to, const OptionalOrigin& dither, int64_t estimator,
                                 double clip_bound, int64_t workspace) {
  STD_TORCH_CHECK(results.size() == 5 && results[0].has_value(), "results: expected W and the gradients of A, B, C, D");
  const Factors factors = factors_of(tensors);
  const WeightJob weight_part =
      weight_job(matrix(results[0], "out"), base_of(weight, layout, factors), factors,
                 rounding_grid(rounded_to, *results[0]), dither);
  check_shape(weight_part.out, "out", factors.B.rows, factors.A.cols);
  sweep(weight_part, h, results.data() + 1, {static_cast<Estimator>(estimator), clip_bound}, workspace);
}

void few_tokens(const Tensor& out, const Tensor& input, const Tensors& weight, const std::vector<int64_t>& layout,
                const Tensors& tensors, const OptionalTensor& bias, const OptionalOrigin& dither) {
  const Factors factors = factors_of(tensors);
  const Matrix x = matrix(input, "input"), y = matrix(out, "out");
  Matrix bias_view;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->is_cpu() && bias->dim() == 1 && bias->size(0) == factors.B.rows, "bias: expected [",
                    factors.B.rows, "] on the CPU");
    bias_view = {bias->data_ptr(), dtype_of(*bias, "bias"), 1, factors.B.rows, 0, bias->stride(0)};
  }
  check_shape(x, "input", x.rows, factors.A.cols);
  check_shape(y, "out", x.rows, factors.B.rows);
  STD_TORCH_CHECK((x.dtype == Dtype::float64) == (factors.A.dtype == Dtype::float64), "input: got ",
                  name_of(input.scalar_type()), " with factors of ", name_of(tensors[0].scalar_type()),
                  ", expected float64 for both or for neither");
  if (x.rows == 0) return;
  TokenJob job = {weight_job({}, base_of(weight, layout, factors), factors, x.dtype, dither), x, y, bias_view};
  const PackedFactors packed(factors, is_wide(factors), Use::weight);
  job.weight_job.packed = packed.view;
  const KernelTable& kernels = instruction_set().kernels;
  const int64_t rows = factors.B.rows,
                step = std::clamp<int64_t>(count(rows, 64 * kRowBlock) * kRowBlock, kRowBlock, kTokenRows);
  const int64_t work = product_work(factors) + rows * factors.A.cols * x.rows;
  for_each_unit(count(rows, step), kernels.token_scratch(job), work, [&](int64_t unit, void* scratch) {
    kernels.token(job, unit * step, std::min(step, rows - unit * step), scratch);
  });
}

std::string capability() { return instruction_set().name; }

}  // namespace
}  // namespace dual_lora

STABLE_TORCH_LIBRARY_FRAGMENT(dual_lora_kernels, m) {
  // weight and layout: see base_of; factors: A, B, C, D, scale; grid: the dtype that W is rounded to; dither: where the
  // block begins in the dither's field, none for rounding to nearest.
  m.def(
      "cpu_effective_weight(Tensor(a!) out, Tensor[] weight, int[] layout, Tensor[] factors, ScalarType grid, "
      "int[]? dither) -> ()");
  m.def(
      "cpu_factor_gradients(Tensor h, Tensor[] factors, Tensor? column_weights, Tensor(a!)?[] gradients, "
      "int estimator, float clip_bound, int workspace) -> ()");
  // results: W, then the gradients of A, B, C and D.
  m.def(
      "cpu_weight_and_factor_gradients(Tensor(a!)?[] results, Tensor[] weight, int[] layout, Tensor h, "
      "Tensor[] factors, "
      "ScalarType grid, int[]? dither, int estimator, float clip_bound, int workspace) -> ()");
  m.def(
      "cpu_few_tokens(Tensor(a!) out, Tensor input, Tensor[] weight, int[] layout, Tensor[] factors, Tensor? bias, "
      "int[]? dither) -> ()");
  m.def("cpu_capability() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(dual_lora_kernels, CPU, m) {
  m.impl("cpu_effective_weight", TORCH_BOX(&dual_lora::effective_weight));
  m.impl("cpu_factor_gradients", TORCH_BOX(&dual_lora::factor_gradients));
  m.impl("cpu_weight_and_factor_gradients", TORCH_BOX(&dual_lora::weight_and_factor_gradients));
  m.impl("cpu_few_tokens", TORCH_BOX(&dual_lora::few_tokens));
}

STABLE_TORCH_LIBRARY_IMPL(dual_lora_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&dual_lora::capability));
}
