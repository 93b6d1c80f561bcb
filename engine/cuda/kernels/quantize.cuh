#ifndef LATENTD_ENGINE_CUDA_KERNELS_QUANTIZE_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_QUANTIZE_CUH_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "engine/cuda/kernels/tensors.h"

namespace latentd {

// The one way in which activations become FP8 (the rule is at the end of norm.h), a warp for each
// group of 128 columns: lane l holds the columns 4 l .. 4 l + 3.

// a / b to the last bit, given 1 / b, for b = 448 or from GroupScale(). This is the compiler's own
// division without its special case for quotients below 2^-126, which are zeros in e4m3 either way;
// and the reciprocal is a group's.
__device__ __forceinline__ float Quotient(float a, float b, float reciprocal) {
  float quotient = a * reciprocal;
  quotient = fmaf(fmaf(-quotient, b, a), reciprocal, quotient);
  return fmaf(fmaf(-quotient, b, a), reciprocal, quotient);
}

__device__ __forceinline__ float GroupScale(float amax, bool power_of_two) {
  const float scale = Quotient(fmaxf(amax, 1e-10f), 448.0f, 1.0f / 448.0f);
  if (!power_of_two) return scale;
  return __uint_as_float((__float_as_uint(scale) + 0x007fffffu) & 0xff800000u);
}

// The largest magnitude of the warp's values: as integers, floats without their sign keep their
// order.
__device__ __forceinline__ float WarpAbsMax(float4 v) {
  const float amax = fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
  return __uint_as_float(__reduce_max_sync(0xffffffffu, __float_as_uint(amax)));
}

__device__ __forceinline__ uint32_t PackFp8(float4 v) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2({v.x, v.y}, __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2({v.z, v.w}, __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

__device__ __forceinline__ uint2 PackBf16(float4 v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y);
  const __nv_bfloat162 high = __floats2bfloat162_rn(v.z, v.w);
  return {*reinterpret_cast<const uint32_t*>(&low), *reinterpret_cast<const uint32_t*>(&high)};
}

__device__ __forceinline__ float4 UnpackBf16(uint2 packed) {
  return {__uint_as_float(packed.x << 16), __uint_as_float(packed.x & 0xffff0000u),
          __uint_as_float(packed.y << 16), __uint_as_float(packed.y & 0xffff0000u)};
}

// Called by a whole warp, for whole groups.
__device__ __forceinline__ void StoreFp8Group(const Fp8Rows& out, int64_t row, int columns,
                                              int group, float4 v, bool power_of_two) {
  const int lane = threadIdx.x % 32;
  const float scale = GroupScale(WarpAbsMax(v), power_of_two);
  const float reciprocal = __frcp_rn(scale);
  const float4 quotient = {Quotient(v.x, scale, reciprocal), Quotient(v.y, scale, reciprocal),
                           Quotient(v.z, scale, reciprocal), Quotient(v.w, scale, reciprocal)};
  *reinterpret_cast<uint32_t*>(out.data + row * columns + group * kQuantGroup + 4 * lane) =
      PackFp8(quotient);
  if (lane == 0) out.scales[group * out.scale_stride + row] = scale;
}

// Both kinds of output, where there. Called by a whole warp; columns beyond `columns`, a multiple
// of 4, are left out (there are none when there is FP8).
__device__ __forceinline__ void StoreGroup(const LinearInput& out, int64_t row, int columns,
                                           int group, float4 v, bool power_of_two) {
  const int column = group * kQuantGroup + 4 * static_cast<int>(threadIdx.x % 32);
  if (out.bf16 != nullptr && column < columns)
    *reinterpret_cast<uint2*>(out.bf16 + row * columns + column) = PackBf16(v);
  if (out.fp8.data != nullptr) StoreFp8Group(out.fp8, row, columns, group, v, power_of_two);
}

// What the launchers of such outputs ask for.
inline bool CanStore(const Fp8Rows& out, int64_t num_rows, int columns) {
  return out.data != nullptr && out.scales != nullptr && out.scale_stride >= num_rows &&
         columns % kQuantGroup == 0;
}
inline bool CanStore(const LinearInput& out, int64_t num_rows, int columns) {
  if (out.fp8.data == nullptr && out.bf16 == nullptr) return false;
  return out.fp8.data == nullptr || CanStore(out.fp8, num_rows, columns);
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_QUANTIZE_CUH_
