#ifndef LATENTD_ENGINE_MODEL_HOST_MEMORY_H_
#define LATENTD_ENGINE_MODEL_HOST_MEMORY_H_

#include <cstdint>
#include <filesystem>

namespace latentd {

// Bytes that this process may still take without swapping or being killed: the kernel's
// MemAvailable, or what the limits of its control groups (v2 or v1) leave, whichever is less. Pages
// of files count as available: they can be dropped. UINT64_MAX when nothing of this can be read.
uint64_t AvailableMemoryBytes();

// The same with /proc and /sys/fs/cgroup under `root`, for tests.
uint64_t AvailableMemoryBytes(const std::filesystem::path& root);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_HOST_MEMORY_H_
