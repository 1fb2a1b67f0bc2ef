// Kernels without intrinsics, for every other processor.
#define DUAL_LORA_NAMESPACE portable
#define DUAL_LORA_VECTORS "vectors/portable.h"
#include "kernels.h"
