// A safetensors file from anywhere: refused, or every byte of every tensor can be read.

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <string>

#include "engine/model/safetensors.h"
#include "engine/status.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int fd = ::memfd_create("fuzz", 0);
  LATENTD_CHECK(fd >= 0);
  LATENTD_CHECK(::write(fd, data, size) == static_cast<ssize_t>(size));
  const auto checkpoint = latentd::Checkpoint::OpenFile("/proc/self/fd/" + std::to_string(fd));
  ::close(fd);
  if (!checkpoint.ok()) return 0;
  unsigned sum = 0;
  uint64_t num_bytes = 0;
  for (const auto& [name, view] : (*checkpoint)->tensors()) {
    LATENTD_CHECK(reinterpret_cast<uintptr_t>(view.data) % latentd::DTypeBytes(view.dtype) == 0);
    for (size_t i = 0; i < view.num_bytes(); ++i) sum += static_cast<unsigned>(view.data[i]);
    num_bytes += view.num_bytes();
  }
  LATENTD_CHECK(num_bytes == (*checkpoint)->num_bytes() && num_bytes <= size);
  return sum == UINT32_MAX ? -1 : 0;
}
