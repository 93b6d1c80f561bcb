#ifndef LATENTD_ENGINE_CUDA_KERNEL_TIMER_H_
#define LATENTD_ENGINE_CUDA_KERNEL_TIMER_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/cuda_handles.h"

namespace latentd {

// The families of a step's kernels.
namespace kernel_family {
inline constexpr std::string_view kNorm = "norm";
inline constexpr std::string_view kProjections = "q and kv projections";
inline constexpr std::string_view kAbsorption = "absorption";
inline constexpr std::string_view kAttention = "attention";
inline constexpr std::string_view kPrefillAttention = "prefill attention";
inline constexpr std::string_view kOutput = "o projection";
inline constexpr std::string_view kDense = "dense MLP";
inline constexpr std::string_view kDispatch = "exchange: dispatch";
inline constexpr std::string_view kCombine = "exchange: combine";
inline constexpr std::string_view kRouter = "router and gather";
inline constexpr std::string_view kGateUp = "experts: gate and up";
inline constexpr std::string_view kQuantize = "experts: quantise";
inline constexpr std::string_view kDown = "experts: down";
inline constexpr std::string_view kHead = "head";
inline constexpr std::string_view kSampling = "sampling";
}  // namespace kernel_family

// Timestamps between the kernels of a step, on a stream that runs or on one that is captured.
class KernelTimer {
 public:
  // `captured`: the stream is being captured into a graph. One launch of it can be timed.
  explicit KernelTimer(bool captured) : captured_(captured) {}

  absl::Status Begin(cudaStream_t stream);
  // What was enqueued since the last call is of `family`; the name must outlive the timer.
  absl::Status Done(std::string_view family, cudaStream_t stream);

  // Once the stream has finished.
  absl::StatusOr<std::vector<CudaEngine::FamilyTime>> Times() const;

 private:
  absl::Status Record(cudaStream_t stream);

  const bool captured_;
  std::vector<CudaEvent> events_;           // [families + 1]
  std::vector<std::string_view> families_;  // of the interval between events i and i + 1
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNEL_TIMER_H_
