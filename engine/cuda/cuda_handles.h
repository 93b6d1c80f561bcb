#ifndef LATENTD_ENGINE_CUDA_CUDA_HANDLES_H_
#define LATENTD_ENGINE_CUDA_CUDA_HANDLES_H_

#include <cuda_runtime_api.h>

#include <memory>
#include <type_traits>

#include "absl/status/statusor.h"
#include "engine/cuda/cuda_status.h"

namespace latentd {

// CUDA's handles, destroyed with their owner.
struct CudaHandleDeleter {
  void operator()(cudaStream_t stream) const { cudaStreamDestroy(stream); }
  void operator()(cudaEvent_t event) const { cudaEventDestroy(event); }
  void operator()(cudaGraph_t graph) const { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const { cudaGraphExecDestroy(graph); }
};
template <typename Handle>
using UniqueCudaHandle = std::unique_ptr<std::remove_pointer_t<Handle>, CudaHandleDeleter>;
using CudaStream = UniqueCudaHandle<cudaStream_t>;
using CudaEvent = UniqueCudaHandle<cudaEvent_t>;
using CudaGraph = UniqueCudaHandle<cudaGraph_t>;
using CudaGraphExec = UniqueCudaHandle<cudaGraphExec_t>;

// A stream that does not wait for the default one.
inline absl::StatusOr<CudaStream> MakeCudaStream() {
  cudaStream_t stream = nullptr;
  RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return CudaStream(stream);
}

// An event that keeps the time.
inline absl::StatusOr<CudaEvent> MakeCudaEvent() {
  cudaEvent_t event = nullptr;
  RETURN_IF_CUDA_ERROR(cudaEventCreateWithFlags(&event, cudaEventDefault));
  return CudaEvent(event);
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_CUDA_HANDLES_H_
