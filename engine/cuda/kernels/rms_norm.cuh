#ifndef LATENTD_ENGINE_CUDA_KERNELS_RMS_NORM_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_RMS_NORM_CUH_

#include <cuda_runtime.h>

namespace latentd {

// RMSNorm in f32, as Transformers computes it: x * rsqrt(mean(x^2) + eps) * weight. A row is cut
// into groups of 128 columns, each a float4 of every lane of a warp. The row's sum of squares is
// that of its groups' sums in one order, whichever warps and thread blocks have made those.

__device__ __forceinline__ float WarpSum(float v) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) v += __shfl_xor_sync(0xffffffffu, v, mask);
  return v;
}

__device__ __forceinline__ float GroupSquareSum(float4 v) {
  return WarpSum(fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, v.x * v.x))));
}

// Called by a whole warp, for a row of `size` columns.
__device__ __forceinline__ float NormFactor(const float* group_sums, int num_groups, int size,
                                            float eps) {
  float sum = 0;
  for (int group = threadIdx.x % 32; group < num_groups; group += 32) sum += group_sums[group];
  return 1.0f / sqrtf(WarpSum(sum) / static_cast<float>(size) + eps);
}

__device__ __forceinline__ float4 Normed(float4 v, float factor, float4 weight) {
  return {v.x * factor * weight.x, v.y * factor * weight.y, v.z * factor * weight.z,
          v.w * factor * weight.w};
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_RMS_NORM_CUH_
