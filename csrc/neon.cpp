// Kernels for AArch64.
#include "vectors/neon.h"
#include "vectors/portable.h"
// after the vectors
#include "kernels.h"

DUAL_LORA_KERNEL_TABLE(neon)
