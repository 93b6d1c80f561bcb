#ifndef LATENTD_ENGINE_CUDA_KERNELS_ROPE_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_ROPE_CUH_

#include <cuda_bf16.h>

#include "engine/cuda/kernels/mla_projection.h"

namespace latentd {

inline constexpr int kRopeDim = 64;

// A head's 64 rope dims in a warp: lane i has pair i, which engine/model/rope.h turns into the dims
// i and 32 + i. Apart, so that a caller may do other things while the pair is loaded.
struct RopePair {
  __nv_bfloat162 x;
  float cos, sin;
};

__device__ __forceinline__ RopePair LoadPair(const RopeTable& rope, int64_t position,
                                             const __nv_bfloat16* x) {
  const int lane = threadIdx.x % 32;
  RopePair pair;
  if (rope.interleave) {
    pair.x = *reinterpret_cast<const __nv_bfloat162*>(x + 2 * lane);
  } else {
    pair.x.x = x[lane];
    pair.x.y = x[kRopeDim / 2 + lane];
  }
  pair.cos = rope.cos[position * (kRopeDim / 2) + lane];
  pair.sin = rope.sin[position * (kRopeDim / 2) + lane];
  return pair;
}

// `factor`, a power of two, takes nothing from the rounding.
__device__ __forceinline__ void StorePair(const RopePair& pair, __nv_bfloat16* out,
                                          float factor = 1) {
  const int lane = threadIdx.x % 32;
  const float a = __bfloat162float(pair.x.x), b = __bfloat162float(pair.x.y);
  // Spelt out: left to the compiler, which product is rounded differs from kernel to kernel.
  out[lane] = __float2bfloat16_rn(factor * fmaf(a, pair.cos, -__fmul_rn(b, pair.sin)));
  out[kRopeDim / 2 + lane] =
      __float2bfloat16_rn(factor * fmaf(b, pair.cos, __fmul_rn(a, pair.sin)));
}

inline bool IsSet(const RopeTable& rope) { return rope.cos != nullptr && rope.sin != nullptr; }

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_ROPE_CUH_
