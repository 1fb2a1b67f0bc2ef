// PyTorch's tensors into the plain views that jobs are made of, each checked against the others.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "job.h"

namespace dual_lora {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

int64_t count(int64_t extent, int64_t step) { return (extent + step - 1) / step; }

const char* name_of(ScalarType dtype) { return torch::headeronly::toString(dtype); }

Dtype dtype_of(ScalarType dtype, const char* name) {
  switch (dtype) {
    case ScalarType::Float: return Dtype::float32;
    case ScalarType::Double: return Dtype::float64;
    case ScalarType::BFloat16: return Dtype::bfloat16;
    case ScalarType::Half: return Dtype::float16;
    default:
      STD_TORCH_CHECK(false, name, ": got ", name_of(dtype), ", expected float32, float64, bfloat16 or float16");
  }
}

Dtype dtype_of(const Tensor& tensor, const char* name) { return dtype_of(tensor.scalar_type(), name); }

Matrix matrix(const Tensor& tensor, const char* name) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  STD_TORCH_CHECK(sizes.size() == 2, name, ": got ", sizes.size(), " dimensions, expected 2");
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  return {tensor.data_ptr(), dtype_of(tensor, name), sizes[0], sizes[1], strides[0], strides[1]};
}

Matrix matrix(const std::optional<Tensor>& tensor, const char* name) {
  return tensor.has_value() ? matrix(*tensor, name) : Matrix{};
}

void check_shape(const Matrix& m, const char* name, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(m.rows == rows && m.cols == cols, name, ": got [", m.rows, ", ", m.cols, "], expected [", rows, ", ",
                  cols, "]");
}

// A 0-dim scale, fp32 or fp64; the kernels round it to the type that they multiply it in, as PyTorch does.
double scalar_of(const Tensor& scale) {
  STD_TORCH_CHECK(scale.is_cpu() && scale.numel() == 1, "scale: got ", scale.numel(),
                  " elements, expected one number on the CPU");
  const Dtype dtype = dtype_of(scale, "scale");
  STD_TORCH_CHECK(dtype == Dtype::float32 || dtype == Dtype::float64, "scale: got ", name_of(scale.scalar_type()),
                  ", expected float32 or float64");
  const void* data = scale.data_ptr();
  return dtype == Dtype::float64 ? *static_cast<const double*>(data) : *static_cast<const float*>(data);
}

using OptionalTensor = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using OptionalOrigin = std::optional<std::vector<int64_t>>;  // of a block in the dither's field; none: no dither

// From A, B, C, D and the scale.
Factors factors_of(const Tensors& tensors) {
  STD_TORCH_CHECK(tensors.size() == 5, "factors: got ", tensors.size(), " tensors, expected A, B, C, D and the scale");
  const Factors factors = {matrix(tensors[0], "A"), matrix(tensors[1], "B"), matrix(tensors[2], "C"),
                           matrix(tensors[3], "D"), scalar_of(tensors[4])};
  check_shape(factors.B, "B", factors.B.rows, factors.A.rows);
  check_shape(factors.C, "C", factors.C.rows, factors.A.cols);
  check_shape(factors.D, "D", factors.B.rows, factors.C.rows);
  for (int i = 1; i < 4; ++i)
    STD_TORCH_CHECK(tensors[i].scalar_type() == tensors[0].scalar_type(), "A, B, C, D: got ",
                    name_of(tensors[0].scalar_type()), " and ", name_of(tensors[i].scalar_type()),
                    ", expected one dtype");
  return factors;
}

// The elements of a dense tensor of a quantised W0.
template <class T>
const T* elements(const Tensor& tensor, const char* name, ScalarType dtype, int64_t least) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.numel() >= least,
                  name, ": got ", tensor.numel(), " elements of ", name_of(tensor.scalar_type()), ", expected at least ",
                  least, " contiguous ones of ", name_of(dtype), " on the CPU");
  return static_cast<const T*>(tensor.data_ptr());
}

// W0 of a block: none, a tensor, or with a `layout` the tensors of a FourBit. The layout: row0, col0, the whole matrix's
// row length, blocksize, nested blocksize (0: none), and dtype (0: float32, 1: bfloat16, 2: float16).
struct Base {
  Matrix dense;
  FourBit four_bit;
};

Base base_of(const Tensors& weight, const std::vector<int64_t>& layout, const Factors& factors) {
  Base base;
  const int64_t rows = factors.B.rows, cols = factors.A.cols;
  if (layout.empty()) {
    STD_TORCH_CHECK(weight.size() <= 1, "weight: got ", weight.size(), " tensors, expected one, or a layout");
    if (weight.empty()) return base;
    base.dense = matrix(weight[0], "weight");
    check_shape(base.dense, "weight", rows, cols);
    return base;
  }
  STD_TORCH_CHECK(layout.size() == 6 && weight.size() == (layout[4] == 0 ? 3 : 6) && layout[3] > 0 && layout[4] >= 0 &&
                      layout[5] >= 0 && layout[5] <= 2 && layout[0] >= 0 && layout[1] >= 0 &&
                      layout[1] + cols <= layout[2],
                  "weight: got ", weight.size(), " tensors and a layout of ", layout.size(),
                  " numbers, which do not fit each other or the factors");
  const Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};
  FourBit& w = base.four_bit;
  w.row0 = layout[0], w.col0 = layout[1], w.row_length = layout[2], w.blocksize = layout[3], w.dtype = dtypes[layout[5]];
  const int64_t reach = (w.row0 + rows) * w.row_length, blocks = count(reach, w.blocksize);
  w.packed = elements<uint8_t>(weight[0], "packed", ScalarType::Byte, count(reach, 2));
  w.table = elements<float>(weight[1], "table", ScalarType::Float, 16);
  if (layout[4] == 0) {
    w.absmax = elements<float>(weight[2], "absmax", ScalarType::Float, blocks);
    return base;
  }
  w.nested_blocksize = layout[4];
  w.nested = elements<uint8_t>(weight[2], "absmax", ScalarType::Byte, blocks);
  w.nested_table = elements<float>(weight[3], "nested_table", ScalarType::Float, 256);
  w.nested_absmax = elements<float>(weight[4], "nested_absmax", ScalarType::Float, count(blocks, w.nested_blocksize));
  w.nested_offset = *elements<float>(weight[5], "offset", ScalarType::Float, 1);
  return base;
}

WeightJob weight_job(const Matrix& out, const Base& base, const Factors& factors, Dtype grid,
                     const OptionalOrigin& dither) {
  STD_TORCH_CHECK(!dither.has_value() || dither->size() == 2, "dither: expected a row and a column");
  const bool has_dither = grid == Dtype::bfloat16 || grid == Dtype::float16;
  WeightJob job = {factors, {}, out, base.dense, grid, 0, 0, dither.has_value() && has_dither, false, base.four_bit};
  if (dither.has_value()) job.row0 = (*dither)[0], job.col0 = (*dither)[1];
  return job;
}

}  // namespace
}  // namespace dual_lora
