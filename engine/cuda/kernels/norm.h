#ifndef LATENTD_ENGINE_CUDA_KERNELS_NORM_H_
#define LATENTD_ENGINE_CUDA_KERNELS_NORM_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/tensors.h"

namespace latentd {

inline constexpr int kMaxNormColumns = 16384;  // hidden_size

// What a layer's half begins with, in one pass over the residual stream: add what the half before
// it gave, RMSNorm, quantise.
struct AddNormArgs {
  int num_rows = 0;     // rows of the result
  int hidden_size = 0;  // up to kMaxNormColumns, a multiple of 8; of 128 when there is FP8
  float eps = 0;
  const float* weight = nullptr;  // [hidden_size]
  float* residual = nullptr;      // [tokens, hidden_size] f32, updated in place

  // At most one of these is added first (embed: replaces the residual).
  const int32_t* tokens = nullptr;            // [num_rows] with
  const __nv_bfloat16* embed = nullptr;       //   [vocab_size, hidden_size]
  const __nv_bfloat16* delta = nullptr;       // [tokens, hidden_size]
  const __nv_bfloat16* expert_out = nullptr;  // [expert rows, hidden_size] with
  MoeRouting routing;  //   row_of and weights: delta[t] = sum over j of weights[t, j] *
                       //   expert_out[row_of[t, j]]

  // Row i of the result is token rows[i]; nullptr: token i. Only those tokens' residuals are
  // updated. With `rows` a token must not occur twice.
  const int32_t* rows = nullptr;

  LinearInput out;  // [num_rows, hidden_size]
  // Round scales up to powers of two (config.json's scale_fmt "ue8m0").
  bool power_of_two_scales = false;
};
// Sums, the mean and the factor are f32, and FP8 is made of the f32 results, not of their bf16. A
// row's bits do not depend on the other rows.
cudaError_t AddNorm(const AddNormArgs& args, cudaStream_t stream);

// bf16 rows to FP8. `num_rows_device`, when given, holds how many of the num_rows there really are.
cudaError_t QuantizeRows(const __nv_bfloat16* x, int64_t x_stride, int num_rows,
                         const int32_t* num_rows_device, int columns, bool power_of_two_scales,
                         const Fp8Rows& out, cudaStream_t stream);

// The scale of 128 values whose largest magnitude is `amax`: amax / 448 (at least 1e-10 / 448),
// rounded up to a power of two if wanted. A value is stored as e4m3(value / scale). engine/cpu does
// the same in its quantised mode.

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_NORM_H_
