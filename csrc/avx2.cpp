// Kernels for AVX2 with FMA and F16C (Intel since Haswell, AMD since Zen).
#define DUAL_LORA_NAMESPACE avx2
#define DUAL_LORA_VECTORS "vectors/avx2.h"
#include "kernels.h"
