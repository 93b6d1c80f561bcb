#include "engine/cuda/cuda_status.h"

#include <string>

#include "absl/strings/str_cat.h"

namespace latentd {

absl::Status CudaStatus(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // errors of a launch are sticky until they are read
  // The name of the function will do: arguments say nothing to who reads it.
  const std::string name(call, std::char_traits<char>::length(call));
  const std::string message =
      absl::StrCat(name.substr(0, name.find('(')), ": ", cudaGetErrorName(error), " (",
                   cudaGetErrorString(error), ")");
  return error == cudaErrorMemoryAllocation ? absl::ResourceExhaustedError(message)
                                            : absl::UnavailableError(message);
}

}  // namespace latentd
