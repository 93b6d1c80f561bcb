#ifndef LATENTD_ENGINE_CUDA_GPU_DUMMY_H_
#define LATENTD_ENGINE_CUDA_GPU_DUMMY_H_

#include <vector>

#include "absl/status/status.h"
#include "engine/cuda/gpu_layout.h"
#include "engine/model/dummy_weights.h"
#include "engine/model/weights.h"

namespace latentd {

// Makes the elements that MakeDummyWeights() gives the sources of `copies`, which `tensors`
// describes, on the current device itself. All are there when it returns.
absl::Status MakeOnGpu(const std::vector<DummyTensor>& tensors,
                       const std::vector<WeightCopy>& copies, const LoadProgress& progress);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GPU_DUMMY_H_
