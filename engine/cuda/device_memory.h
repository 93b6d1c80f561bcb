#ifndef LATENTD_ENGINE_CUDA_DEVICE_MEMORY_H_
#define LATENTD_ENGINE_CUDA_DEVICE_MEMORY_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/status/statusor.h"

namespace latentd {

// One allocation of the GPU or of pinned host memory, freed with its owner. Bytes are not
// initialised.
class DeviceMemory {
 public:
  static absl::StatusOr<DeviceMemory> Allocate(size_t bytes);
  DeviceMemory() = default;
  DeviceMemory(DeviceMemory&& other) noexcept { *this = std::move(other); }
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceMemory();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

class PinnedMemory {
 public:
  static absl::StatusOr<PinnedMemory> Allocate(size_t bytes);
  PinnedMemory() = default;
  PinnedMemory(PinnedMemory&& other) noexcept { *this = std::move(other); }
  PinnedMemory& operator=(PinnedMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~PinnedMemory();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Deals out pieces of one allocation, aligned to 256 bytes. Without memory (nullptr) it only
// counts: a memory plan and the allocation that follows it are the same code run twice.
class Carver {
 public:
  explicit Carver(std::byte* data) : data_(data) {}

  // Room for `count` elements; nullptr while counting.
  template <typename T>
  T* Take(size_t count) {
    std::byte* at = data_ == nullptr ? nullptr : data_ + used_;
    used_ += (count * sizeof(T) + 255) / 256 * 256;
    return reinterpret_cast<T*>(at);
  }
  size_t used() const { return used_; }

 private:
  std::byte* data_;
  size_t used_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_DEVICE_MEMORY_H_
