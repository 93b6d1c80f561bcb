#ifndef LATENTD_ENGINE_CUDA_CUBLAS_H_
#define LATENTD_ENGINE_CUDA_CUBLAS_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/cuda/kernels/tensors.h"

namespace latentd {

// Dense products by cuBLASLt. The library is loaded by name when the first Cublas is made, so that
// a program with the CUDA engine in it starts without. Plans are chosen once per shape and kept;
// calls allocate nothing and can be captured. Not thread-safe.
class Cublas {
 public:
  // UNAVAILABLE, with where it was looked for, when there is no cuBLASLt.
  static absl::StatusOr<std::unique_ptr<Cublas>> Create();
  virtual ~Cublas() = default;

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

  // out [rows, n] bf16 = x W^T; x FP8 with scales for FP8 weights, else bf16.
  virtual absl::Status Linear(const LinearInput& x, int rows, const WeightMatrix& weight,
                              __nv_bfloat16* out, int64_t out_stride, cudaStream_t stream) = 0;

  // out [rows, n] f32 = x [rows, k] W^T [n, k], bf16: the head, the router of a long prompt.
  virtual absl::Status LinearF32(const __nv_bfloat16* x, int rows, const __nv_bfloat16* weight,
                                 int n, int k, float* out, int64_t out_stride,
                                 cudaStream_t stream) = 0;

  // `batch` bf16 products side by side: out_b [rows, n] = x_b [rows, k] op(W_b); strides in
  // elements.
  struct Batched {
    const __nv_bfloat16* x = nullptr;
    int64_t x_stride = 0;  // row to row
    int64_t x_batch_stride = 0;
    const __nv_bfloat16* weight = nullptr;
    int64_t weight_stride = 0;  // row to row
    int64_t weight_batch_stride = 0;
    bool weight_is_k_by_n = false;  // W_b is [k, n], else [n, k] and transposed
    __nv_bfloat16* out = nullptr;
    int64_t out_stride = 0;
    int64_t out_batch_stride = 0;
    int rows = 0, n = 0, k = 0, batch = 0;
  };
  virtual absl::Status LinearBatched(const Batched& args, cudaStream_t stream) = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_CUBLAS_H_
