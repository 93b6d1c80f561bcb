#ifndef LATENTD_ENGINE_CUDA_GPU_COPY_H_
#define LATENTD_ENGINE_CUDA_GPU_COPY_H_

#include <vector>

#include "absl/status/status.h"
#include "engine/cuda/gpu_layout.h"
#include "engine/model/weights.h"

namespace latentd {

// Reads the sources of `copies` from their files into pinned buffers, several threads at once, and
// copies them from there to the current device. All have arrived when it returns.
absl::Status CopyToGpu(const Checkpoint& checkpoint, const std::vector<WeightCopy>& copies,
                       const LoadProgress& progress);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GPU_COPY_H_
