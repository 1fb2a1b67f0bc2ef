// Which instruction set runs.
#pragma once

#include "job.h"

namespace dual_lora {

// The best kernels that were compiled and that this processor runs; DUAL_LORA_CPU_CAPABILITY names lesser ones. Chosen
// once.
const KernelTable& kernel_table();

}  // namespace dual_lora
