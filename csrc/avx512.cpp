// Kernels for AVX-512F (Intel since Skylake-SP, AMD since Zen 4).
#define DUAL_LORA_NAMESPACE avx512
#define DUAL_LORA_VECTORS "vectors/avx512.h"
#include "kernels.h"
