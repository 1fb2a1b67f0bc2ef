// What the operators hand to the kernels: views of tensors, and one job for each of the three sweeps over a weight.
//
// Plain data without torch, so that the kernels' files need no header of it. Shapes as in
// dual_lora_kernels/reference.py: W0 [n, k], A [r1, k], B [n, r1], C [r2, k], D [n, r2], H [n, k].
#pragma once

#include <cstddef>
#include <cstdint>

namespace dual_lora {

enum class Dtype { float32, float64, bfloat16, float16 };

// A 2-D tensor with any strides (in elements). `data` is null for one that is not there.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::float32;
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t row_stride = 0;
  int64_t col_stride = 0;
};

// A quantised W0 in which a byte holds two codes of a table: the whole matrix, of rows of `row_length` elements, whose
// element (row0, col0) is the job's first. Numbers are table[code] · absmax, rounded to `dtype`. `packed` is null where
// there is none, `nested` where absmax is not quantised itself (dual_lora_kernels/quantised/four_bit.py specifies it).
struct FourBit {
  const uint8_t* packed = nullptr;
  const float* table = nullptr;
  const float* absmax = nullptr;
  const uint8_t* nested = nullptr;
  const float* nested_table = nullptr;
  const float* nested_absmax = nullptr;
  float nested_offset = 0;
  int64_t row0 = 0, col0 = 0, row_length = 0, blocksize = 1, nested_blocksize = 1;
  Dtype dtype = Dtype::float32;
};

// In the gradients of B and D column j counts `column_weights[j]` times, or once where that is null.
struct Factors {
  Matrix A, B, C, D;
  double scale;
  const float* column_weights = nullptr;
};

// A rectangle of the block that a job is about.
struct Range {
  int64_t row, rows, col, cols;
};

enum class Estimator : int64_t { clip, dorefa, xnor };

// How ∂Q passes the sign. The bound is that of `clip`.
struct StraightThrough {
  Estimator estimator;
  double clip_bound;
};

// A pair of factors (up @ down) as the products read it, in one accumulation type: `down` strip by strip and `up` block
// by block. Only gradients need `down` transposed: `down_t`, or rounded to bf16 in pairs of neighbours `down_pairs`, and
// then `up_pairs` for `up`. What is not needed is null. See packed_factors.h.
struct PackedPair {
  void* down;
  void* up;
  void* down_t;
  uint16_t* down_pairs;
  uint16_t* up_pairs;
};

struct Packed {
  PackedPair magnitude, direction;
};

// out = round(W0 + ΔW), rounded to the grid of `grid`, which `out`'s own dtype holds; `row0`, `col0` place the block in
// the full weight, for the dither.
struct WeightJob {
  Factors factors;
  Packed packed;  // in the factors' accumulation type
  Matrix out, weight;
  Dtype grid;
  int64_t row0, col0;
  bool dithers;
  bool streams;  // write past the caches, if that is possible
  FourBit four_bit;  // W0 where `weight` is not
};

// Partial sums of the factors' gradients from H, of any dtype that the accumulation type holds, and W as well where
// `weight_job.out` is there (it may be H itself).
struct GradientJob {
  WeightJob weight_job;
  Matrix h;
  bool is_wide;        // the sums are fp64, else fp32
  bool in_pairs;       // ∂P, ∂Q and the factors are rounded to bf16 for the contractions, as H has been
  Packed wide_packed;  // in the sums' type
  StraightThrough ste;
  bool magnitude, direction;  // which of (∂A, ∂B) and (∂C, ∂D) are wanted
};

// Y = X Wᵀ + b for few tokens, W rebuilt and used in cache.
struct TokenJob {
  WeightJob weight_job;  // without `out`
  Matrix x, y, bias;
};

// Partial sums of one unit of a GradientJob. `down`: [padded ranks, down_stride] for A and C; `up`:
// [unit's rows, padded ranks] for B and D.
struct Partials {
  void* down;
  int64_t down_stride;
  void* up;
};

// Work is cut into units, rectangles that depend on the shape and the workspace: sums have one order, whatever the
// number of threads.
inline constexpr int64_t kUnitCols = 384;  // at most; a constant so that strides are known to the compiler
inline constexpr int64_t kTokenRows = 64;
inline constexpr int64_t kRowBlock = 16;  // rows that a kernel works on at a time
inline constexpr int64_t kRankStep = 4;   // ranks that a product works on at a time

// Row stride of a unit's blocks: a cache line more than a power of two's multiple, or their rows would share few cache
// sets (generating W took 1.5 times as long).
inline constexpr int64_t kStride = kUnitCols + 16;

// Ranks are stored padded with zeros, which change no sum, to whole vectors of any instruction set. These functions are
// static, not inline: several files contain them, each compiled for another instruction set. Of an inline function the
// linker would keep the copy of any one of these files, and another processor might not know its instructions.
static constexpr int64_t padded_rank(int64_t rank) { return (rank + 15) / 16 * 16; }
static constexpr int64_t stepped_rank(int64_t rank) { return (rank + kRankStep - 1) / kRankStep * kRankStep; }
static constexpr int64_t padded_ranks(const Factors& factors) {
  return padded_rank(factors.A.rows) + padded_rank(factors.C.rows);
}

// Elements of a PackedPair's parts.
static constexpr int64_t down_size(int64_t rank, int64_t cols) {
  return (cols + kUnitCols - 1) / kUnitCols * padded_rank(rank) * kStride;
}
static constexpr int64_t up_size(int64_t rank, int64_t rows) {
  return (rows + kRowBlock - 1) / kRowBlock * kRowBlock * padded_rank(rank);
}
static constexpr int64_t down_t_size(int64_t rank, int64_t cols) { return (cols + 15) / 16 * 16 * padded_rank(rank); }
static constexpr int64_t down_pairs_size(int64_t rank, int64_t cols) { return down_t_size(rank, cols); }
static constexpr int64_t up_pairs_size(int64_t rank, int64_t rows) { return up_size(rank, rows); }

// One instruction set's kernels. Each works on one range with `scratch` of its own (64-byte aligned).
struct KernelTable {
  bool has_pairs;  // whether gradient jobs may be `in_pairs`
  // Packing, in fp32 or (wide) fp64: strips of kUnitCols columns and blocks of kRowBlock rows by themselves.
  void (*pack_strip)(const Factors&, bool wide, int64_t strip, const Packed&);
  void (*pack_block)(const Factors&, bool wide, int64_t block, const Packed&);
  size_t (*weight_scratch)(const WeightJob&);
  void (*weight)(const WeightJob&, Range, void* scratch);
  size_t (*gradient_scratch)(const GradientJob&);
  void (*gradient)(const GradientJob&, Range, const Partials&, void* scratch);
  size_t (*token_scratch)(const TokenJob&);
  void (*token)(const TokenJob&, int64_t row, int64_t rows, void* scratch);
};

}  // namespace dual_lora
