// Memory of one kernel call, handed out in cache lines.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

constexpr size_t kCacheLine = 64;

// Hands out parts of a buffer; with a null buffer it only counts, so a kernel's needs are written down once.
struct Scratch {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* part = base == nullptr ? nullptr : base + used;
    used += (static_cast<size_t>(count) * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
    return reinterpret_cast<T*>(part);
  }
};

}  // namespace
