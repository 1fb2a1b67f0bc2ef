// Vectors for processors without kernels of their own.
#pragma once

#include "lanes.h"

namespace dual_lora::portable {
namespace {

using F32 = Lanes<float, 8>;
using F64 = Lanes<double, 4>;

constexpr bool kHasPairs = false;

inline void fence() {}

}  // namespace
}  // namespace dual_lora::portable
