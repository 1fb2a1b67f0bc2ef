// Kernels without intrinsics, for every other processor.
#include "vectors/portable.h"

namespace {
using F32 = Lanes<float, 8>;
using F64 = Lanes<double, 4>;
inline void fence() {}
}  // namespace
// after the vectors
#include "kernels.h"

DUAL_LORA_KERNEL_TABLE(portable)
