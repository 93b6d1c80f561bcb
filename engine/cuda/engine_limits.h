#ifndef LATENTD_ENGINE_CUDA_ENGINE_LIMITS_H_
#define LATENTD_ENGINE_CUDA_ENGINE_LIMITS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"

namespace latentd {

// The multiprocessors of the largest Hopper GPU. Plans of work are made for so many or fewer.
inline constexpr int kMaxMultiprocessors = 132;

// INVALID_ARGUMENT names the option, its value and the limit.
absl::Status CheckCudaOptions(const ModelConfig& config, const CudaEngineOptions& options);

// What the options' zeros and limits come to.
int32_t MaxModelLen(const ModelConfig& config, const CudaEngineOptions& options);
int32_t MaxGraphSequences(const CudaEngineOptions& options);
inline Placement PlacementOf(const CudaEngineOptions& options) {
  return options.placement.value_or(Placement{});
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_ENGINE_LIMITS_H_
