#ifndef LATENTD_ENGINE_CUDA_KERNELS_TENSORS_H_
#define LATENTD_ENGINE_CUDA_KERNELS_TENSORS_H_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace latentd {

inline constexpr int kQuantGroup = 128;  // columns that share a scale; weights: rows too

// Activations in FP8: the value of (row, column) is data * scale of the row's group of 128 columns.
// The layout is that of cuBLASLt's VEC128 scales and of fp8_gemm.h.
struct Fp8Rows {
  __nv_fp8_e4m3* data = nullptr;  // [rows, columns]
  float* scales = nullptr;        // [columns / 128, scale_stride]: groups outside, rows inside
  int64_t scale_stride = 0;       // >= rows, a multiple of 4
};

// Where a kernel puts rows that a linear layer reads next: FP8 for FP8 weights, bf16 for bf16
// weights and the router. Either may be absent (nullptr), not both.
struct LinearInput {
  Fp8Rows fp8;
  __nv_bfloat16* bf16 = nullptr;  // [rows, columns]
};

// Weights of `num_groups` products of one shape, in FP8 or bf16: y = x W^T.
struct WeightMatrix {
  const __nv_fp8_e4m3* fp8 = nullptr;  // [num_groups, n, k]
  // [num_groups, ceil(n / 128), scale_stride] f32, one scale for each block of 128 x 128.
  const float* scales = nullptr;
  int scale_stride = 0;  // k / 128 rounded up to a multiple of 4, as cuBLASLt wants it
  const __nv_bfloat16* bf16 = nullptr;  // [num_groups, n, k], when there is no FP8
  int num_groups = 1;
  int n = 0;  // out_features
  int k = 0;  // in_features, a multiple of 128 when FP8, of 8 when bf16

  bool is_fp8() const { return fp8 != nullptr; }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_TENSORS_H_
