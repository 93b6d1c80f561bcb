#ifndef LATENTD_ENGINE_CPU_ALIGNED_H_
#define LATENTD_ENGINE_CPU_ALIGNED_H_

#include <cstddef>
#include <new>
#include <vector>

namespace latentd {

// Allocates on cache lines: a vector load that straddles two costs twice.
template <typename T>
struct CacheLineAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  CacheLineAllocator() = default;
  template <typename U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}  // NOLINT: allocators convert

  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, size_t) { ::operator delete(p, kAlignment); }
  friend bool operator==(CacheLineAllocator, CacheLineAllocator) { return true; }
};

template <typename T>
using AlignedVector = std::vector<T, CacheLineAllocator<T>>;

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_ALIGNED_H_
