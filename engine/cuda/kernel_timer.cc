#include "engine/cuda/kernel_timer.h"

#include <algorithm>
#include <utility>

#include "engine/status.h"

namespace latentd {

absl::Status KernelTimer::Begin(cudaStream_t stream) { return Record(stream); }

absl::Status KernelTimer::Done(std::string_view family, cudaStream_t stream) {
  families_.push_back(family);
  return Record(stream);
}

absl::Status KernelTimer::Record(cudaStream_t stream) {
  ASSIGN_OR_RETURN(CudaEvent event, MakeCudaEvent());
  RETURN_IF_CUDA_ERROR(cudaEventRecordWithFlags(
      event.get(), stream, captured_ ? cudaEventRecordExternal : cudaEventRecordDefault));
  events_.push_back(std::move(event));
  return absl::OkStatus();
}

absl::StatusOr<std::vector<CudaEngine::FamilyTime>> KernelTimer::Times() const {
  std::vector<CudaEngine::FamilyTime> times;
  for (size_t i = 0; i < families_.size(); ++i) {
    float ms = 0.0f;
    RETURN_IF_CUDA_ERROR(cudaEventElapsedTime(&ms, events_[i].get(), events_[i + 1].get()));
    auto at = std::find_if(times.begin(), times.end(),
                           [&](const auto& time) { return time.family == families_[i]; });
    if (at == times.end()) at = times.insert(at, {.family = families_[i]});
    at->seconds += ms * 1e-3;
    ++at->intervals;
  }
  return times;
}

}  // namespace latentd
