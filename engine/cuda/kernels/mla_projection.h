#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_PROJECTION_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_PROJECTION_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/kernels/mla_cache.h"
#include "engine/cuda/kernels/tensors.h"

namespace latentd {

// The small steps around MLA's projections.

struct RopeTable {
  const float* cos = nullptr;  // [num_positions, 32] f32
  const float* sin = nullptr;  // [num_positions, 32] f32
  // Pairs of the input are neighbours (true) or halves; of the output always halves, as
  // Transformers leaves them.
  bool interleave = true;
};

inline constexpr int kMaxQLoraRank = 3456;  // that NormLatents is compiled for

// After the fused q_a/kv_a projection: both norms, RoPE on the key's 64 dims, and the new rows of
// the latent cache.
struct LatentArgs {
  int num_tokens = 0;
  const __nv_bfloat16* qkv_a = nullptr;  // [num_tokens, q_dim + 576]: q_a, latents, rope key
  int q_dim = 0;                         // q_lora_rank, or num_heads * 192 when there is none
  // [q_lora_rank], up to kMaxQLoraRank; nullptr: q needs nothing, q_out is not written.
  const float* q_a_layernorm = nullptr;
  const float* kv_a_layernorm = nullptr;  // [512]
  float eps = 0;
  RopeTable rope;
  const int32_t* positions = nullptr;  // [num_tokens]
  // [num_tokens] row of the cache: block * 64 + offset; < 0: not written.
  const int64_t* slots = nullptr;
  MlaCache cache;  // of this layer
  bool power_of_two_scales = false;
  LinearInput q_out;  // [num_tokens, q_lora_rank]
};
cudaError_t NormLatents(const LatentArgs& args, cudaStream_t stream);

// Queries into latent space, for MlaDecode: out[t, h, 0..511] = sum over d of q[t, h, d] * w_uk[h,
// d, :], and the rotated rope part in out[t, h, 512..575]. Any number of tokens; made for up to 64,
// which share one reading of the weights' tile from shared memory.
struct AbsorbQueryArgs {
  int num_tokens = 0;
  int num_heads = 0;
  const __nv_bfloat16* q = nullptr;  // [num_tokens, q_stride]: heads of 128 + 64
  int64_t q_stride = 0;
  const __nv_bfloat16* w_uk = nullptr;  // [num_heads, 128, 512]
  RopeTable rope;
  const int32_t* positions = nullptr;  // [num_tokens]
  __nv_bfloat16* out = nullptr;        // [num_tokens, num_heads, 576]
};
cudaError_t AbsorbQuery(const AbsorbQueryArgs& args, cudaStream_t stream);

// Out of latent space, for o_proj: out[t, h * 128 + v] = sum over c of latent[t, h, c] * w_uv[h, v,
// c]. A head's 128 values are one group of the FP8 result, made of the f32 sums. Any number of
// tokens; made for up to 64.
struct ProjectValueArgs {
  int num_tokens = 0;
  int num_heads = 0;
  const __nv_bfloat16* latent = nullptr;  // [num_tokens, num_heads, 512]
  const __nv_bfloat16* w_uv = nullptr;    // [num_heads, 128, 512]
  bool power_of_two_scales = false;
  LinearInput out;  // [num_tokens, num_heads * 128]
};
cudaError_t ProjectValue(const ProjectValueArgs& args, cudaStream_t stream);

// Rotates the last 64 dims of each head of q [num_tokens, q_stride], in place: heads of 192.
cudaError_t RopeQuery(__nv_bfloat16* q, int64_t q_stride, int num_tokens, int num_heads,
                      const RopeTable& rope, const int32_t* positions, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_PROJECTION_H_
