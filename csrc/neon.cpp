// Kernels for AArch64.
#define DUAL_LORA_NAMESPACE neon
#define DUAL_LORA_VECTORS "vectors/neon.h"
#include "kernels.h"
