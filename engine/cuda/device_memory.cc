#include "engine/cuda/device_memory.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/cuda/cuda_status.h"

namespace latentd {

absl::StatusOr<DeviceMemory> DeviceMemory::Allocate(size_t bytes) {
  DeviceMemory memory;
  const absl::Status status =
      CudaStatus(cudaMalloc(reinterpret_cast<void**>(&memory.data_), bytes), "cudaMalloc");
  if (!status.ok()) {
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    return absl::Status(status.code(),
                        absl::StrCat(status.message(), ": ", bytes, " bytes asked for, ", free,
                                     " of ", total, " are free"));
  }
  memory.bytes_ = bytes;
  return memory;
}

DeviceMemory::~DeviceMemory() {
  if (data_ != nullptr) cudaFree(data_);
}

absl::StatusOr<PinnedMemory> PinnedMemory::Allocate(size_t bytes) {
  PinnedMemory memory;
  const absl::Status status =
      CudaStatus(cudaMallocHost(reinterpret_cast<void**>(&memory.data_), bytes), "cudaMallocHost");
  if (!status.ok()) {
    return absl::Status(status.code(), absl::StrCat(status.message(), ": ", bytes,
                                                    " bytes of pinned host memory asked for"));
  }
  memory.bytes_ = bytes;
  return memory;
}

PinnedMemory::~PinnedMemory() {
  if (data_ != nullptr) cudaFreeHost(data_);
}

}  // namespace latentd
