#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dual_lora {

std::vector<InstructionSet> instruction_sets() {
  return {
#define DUAL_LORA_INSTRUCTION_SET(name, architecture, runs, flags) {#name, name::kernels, (runs) != 0},
#include "instruction_sets.inc"
  };
}

static InstructionSet choose() {
  const char* wanted = std::getenv("DUAL_LORA_CPU_CAPABILITY");
  std::string known;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.runs) continue;
    if (wanted == nullptr || *wanted == '\0' || set.name == std::string(wanted)) return set;
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  throw std::runtime_error("DUAL_LORA_CPU_CAPABILITY: got '" + std::string(wanted) +
                           "', this build on this processor has " + known);
}

const InstructionSet& instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

}  // namespace dual_lora
