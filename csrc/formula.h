// The formula on one vector of elements; dual_lora_kernels/reference.py specifies it.
//
// Multiplications and additions stay separate here (the files are compiled with -ffp-contract=off): W must have the
// reference's bits, and the same ones on every instruction set.
#pragma once

#include "job.h"

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

// ΔW = s · max(P, 0) ⊙ sgn(Q).
template <class V>
inline V update(V p, V q, V scale) {
  return signed_by(mul(scale, relu(p)), q);
}

template <class V>
struct ProductGradients {
  V p, q;
};

// ∂P = s·H ⊙ sgn(Q) ⊙ 1[P > 0] and ∂Q = ste(s·H ⊙ max(P, 0)).
template <class V>
inline ProductGradients<V> product_gradients(V h, V p, V q, V scale, Estimator estimator, V bound) {
  const V scaled = mul(scale, h);
  V grad_q = mul(scaled, relu(p));
  if (estimator == Estimator::clip) {
    grad_q = clamp(grad_q, bound);
  } else if (estimator == Estimator::xnor) {
    grad_q = where_within_one(q, grad_q);
  }
  return {where_positive(p, signed_by(scaled, q)), grad_q};
}

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
