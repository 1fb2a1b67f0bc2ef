// Memory of one kernel call, handed out in cache lines.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace dual_lora::DUAL_LORA_NAMESPACE {
namespace {

constexpr size_t kCacheLine = 64;

// Hands out parts of a buffer; with a null buffer it only counts, so a kernel's needs are written down once.
struct Scratch {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* part = base == nullptr ? nullptr : base + used;
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    used += (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
#if defined(__SANITIZE_ADDRESS__)
    used += kCacheLine;  // what lies between the parts is nobody's
    if (base != nullptr) ASAN_POISON_MEMORY_REGION(part + bytes, base + used - (part + bytes));
#endif
    return reinterpret_cast<T*>(part);
  }
};

}  // namespace
}  // namespace dual_lora::DUAL_LORA_NAMESPACE
