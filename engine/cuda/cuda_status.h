#ifndef LATENTD_ENGINE_CUDA_CUDA_STATUS_H_
#define LATENTD_ENGINE_CUDA_CUDA_STATUS_H_

#include <cuda_runtime_api.h>

#include "absl/status/status.h"

namespace latentd {

// OK, or an error that names `call` and what CUDA said of it: RESOURCE_EXHAUSTED when memory ran
// out, else UNAVAILABLE: after most errors the context of the process is lost, and the engine with
// it (CudaEngine says so).
absl::Status CudaStatus(cudaError_t error, const char* call);

// Returns from the enclosing function when a call of the CUDA runtime fails.
//   RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(...));
#define RETURN_IF_CUDA_ERROR(call)                                                        \
  do {                                                                                    \
    if (const cudaError_t latentd_cuda_error = (call); latentd_cuda_error != cudaSuccess) \
      return ::latentd::CudaStatus(latentd_cuda_error, #call);                            \
  } while (false)

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_CUDA_STATUS_H_
