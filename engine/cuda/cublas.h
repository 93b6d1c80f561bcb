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
// a program with the CUDA engine in it starts without: from the environment variable
// LATENTD_CUBLASLT (a path) or else the loader's folders, /usr/local/cuda and the toolkit of the
// build.
//
// Algorithms are chosen once for each shape and class of row counts (exact up to 16 rows, then
// steps of 1/8 of a power of two) and kept: the first call of a shape costs the host some 100 us
// more, and should not lie in a captured graph. Calls allocate no device memory, do not synchronise
// and can be captured. Sums are f32 throughout, and the same call gives the same bits again; but
// not with another number of rows: a row's bits depend on the algorithm of its class (but see
// Batched::planned_rows).
//
// Pointers are aligned to 16 bytes. All calls share one workspace: one thread, one stream at a
// time.
//
// INVALID_ARGUMENT for arguments that no product has, UNIMPLEMENTED for a shape that cuBLASLt
// refuses, with the shape.
class Cublas {
 public:
  // For the current device. UNAVAILABLE, with where it was looked for, when there is no cuBLASLt of
  // CUDA 12.9 or later.
  static absl::StatusOr<std::unique_ptr<Cublas>> Create();
  virtual ~Cublas() = default;

  static constexpr size_t kWorkspaceBytes = size_t{32} << 20;

  // Rows of an FP8 product come in fours: x.fp8.data, its scales and out have room for so many, the
  // scales' stride is exactly that, and the rows added are computed from what lies there and
  // written to out. bf16 products take any number of rows.
  static constexpr int PaddedRows(int rows) { return (rows + 3) / 4 * 4; }

  // out [rows, n] bf16 = x W^T; x FP8 with scales for FP8 weights, else bf16. One group. n: a
  // multiple of 8 when FP8.
  virtual absl::Status Linear(const LinearInput& x, int rows, const WeightMatrix& weight,
                              __nv_bfloat16* out, int64_t out_stride, cudaStream_t stream) = 0;

  // out [rows, n] f32 = x [rows, k] W^T [n, k], bf16: the head, the router of a long prompt.
  virtual absl::Status LinearF32(const __nv_bfloat16* x, int rows, const __nv_bfloat16* weight,
                                 int n, int k, float* out, int64_t out_stride,
                                 cudaStream_t stream) = 0;

  // `batch` bf16 products side by side: out_b [rows, n] = x_b [rows, k] op(W_b); strides in
  // elements. A batch stride of 0 uses one operand for all.
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
    // The algorithm for so many rows, >= rows, is taken: with one number here a row's bits do not
    // depend on how many rows there are. 0: rows.
    int planned_rows = 0;
  };
  virtual absl::Status LinearBatched(const Batched& args, cudaStream_t stream) = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_CUBLAS_H_
