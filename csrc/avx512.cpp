// Kernels for AVX-512F (Intel since Skylake-SP, AMD since Zen 4).
#include "vectors/avx512.h"
#include "vectors/portable.h"
// after the vectors
#include "kernels.h"

DUAL_LORA_KERNEL_TABLE(avx512)
