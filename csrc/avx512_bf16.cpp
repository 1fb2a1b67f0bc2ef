// Kernels for AVX-512 with products of bf16 pairs (Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4).
#define DUAL_LORA_NAMESPACE avx512_bf16
#define DUAL_LORA_VECTORS "vectors/avx512.h"
#include "kernels.h"
