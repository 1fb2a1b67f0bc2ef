#include "capability.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace dual_lora {

// One per file; setup.py compiles those that fit the machine's architecture and defines these macros.
#if defined(DUAL_LORA_X86)
const KernelTable& avx512();
const KernelTable& avx2();
#elif defined(DUAL_LORA_NEON)
const KernelTable& neon();
#endif
const KernelTable& portable();

namespace {

struct Choice {
  const KernelTable& (*table)();
  bool runs;
};

const KernelTable& choose() {
  const Choice choices[] = {
#if defined(DUAL_LORA_X86)
      {avx512, __builtin_cpu_supports("avx512f") != 0},
      {avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#elif defined(DUAL_LORA_NEON)
      {neon, true},
#endif
      {portable, true},
  };
  const char* wanted = std::getenv("DUAL_LORA_CPU_CAPABILITY");
  std::string known;
  for (const Choice& choice : choices) {
    if (!choice.runs) continue;
    const KernelTable& table = choice.table();
    if (wanted == nullptr || *wanted == '\0' || table.name == std::string(wanted)) return table;
    known += (known.empty() ? "" : ", ") + std::string(table.name);
  }
  throw std::runtime_error("DUAL_LORA_CPU_CAPABILITY: got '" + std::string(wanted) +
                           "', this build on this processor has " + known);
}

}  // namespace

const KernelTable& kernel_table() {
  static const KernelTable& table = choose();
  return table;
}

}  // namespace dual_lora
