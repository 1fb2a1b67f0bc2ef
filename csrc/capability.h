// The instruction sets that were compiled, and the one that runs.
#pragma once

#include <vector>

#include "job.h"

namespace dual_lora {

#define DUAL_LORA_INSTRUCTION_SET(name, ...) \
  namespace name {                           \
  extern const KernelTable kernels;          \
  }
#include "instruction_sets.inc"

struct InstructionSet {
  const char* name;
  const KernelTable& kernels;
  bool runs;  // on this processor
};

// Best first.
std::vector<InstructionSet> instruction_sets();

// The best one that runs; DUAL_LORA_CPU_CAPABILITY names lesser ones. Chosen once.
const InstructionSet& instruction_set();

}  // namespace dual_lora
