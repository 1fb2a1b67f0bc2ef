// Kernels for AVX2 with FMA and F16C (Intel since Haswell, AMD since Zen).
#include "vectors/avx2.h"
#include "vectors/portable.h"
// after the vectors
#include "kernels.h"

DUAL_LORA_KERNEL_TABLE(avx2)
