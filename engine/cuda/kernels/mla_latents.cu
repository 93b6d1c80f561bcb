// NormLatents and RopeQuery of mla_projection.h: a few KB a token, bound by latency at decode and
// by memory at prefill.

#include <algorithm>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mla_projection.h"
#include "engine/cuda/kernels/quantize.cuh"
#include "engine/cuda/kernels/rms_norm.cuh"
#include "engine/cuda/kernels/rope.cuh"

namespace latentd {
namespace {

constexpr int kLatentDim = kMlaLatentDim;
constexpr int kLatentGroups = kLatentDim / kQuantGroup;
constexpr int kKeyDim = kLatentDim + kRopeDim;
constexpr int kMaxWarps = 32;
constexpr int kMaxQueryGroups = kMaxWarps - kLatentGroups - 1;
static_assert(kMaxQueryGroups * kQuantGroup == kMaxQLoraRank);

// The scale of a token's row in an FP8 cache, of its normed latents' largest magnitude: not a
// number when a latent is none, which FP8 alone would hide.
__device__ __forceinline__ float CacheScale(const float* group_maxima, float factor) {
  float amax = group_maxima[0];
#pragma unroll
  for (int group = 1; group < kLatentGroups; ++group) amax = fmaxf(amax, group_maxima[group]);
  amax *= factor;
  return isnan(amax) ? amax : GroupScale(amax, /*power_of_two=*/true);
}

// A warp has the rotated dims of a token, or four columns a lane of its latents.
__device__ __forceinline__ void StoreCacheRope(const MlaCache& cache, int64_t slot,
                                               const RopePair& pair, float scale) {
  if (cache.format == CacheFormat::kBf16) {
    StorePair(pair,
              reinterpret_cast<__nv_bfloat16*>(cache.data + MlaBf16Offset(slot)) + kLatentDim);
    return;
  }
  StorePair(pair, reinterpret_cast<__nv_bfloat16*>(cache.data + MlaFp8RopeOffset(slot)), 1 / scale);
  if (threadIdx.x % 32 == 0)
    *reinterpret_cast<float*>(cache.data + MlaFp8ScaleOffset(slot)) = scale;
}
__device__ __forceinline__ void StoreCacheLatents(const MlaCache& cache, int64_t slot, int column,
                                                  float4 v, float scale) {
  if (cache.format == CacheFormat::kBf16) {
    *reinterpret_cast<uint2*>(cache.data + MlaBf16Offset(slot) + 2 * column) = PackBf16(v);
    return;
  }
  const float inverse = 1 / scale;
  *reinterpret_cast<uint32_t*>(cache.data + MlaFp8LatentsOffset(slot) + column) =
      PackFp8({v.x * inverse, v.y * inverse, v.z * inverse, v.w * inverse});
}

// A block takes kTokens tokens; its warps are num_query_groups for q_a's groups of 128 columns,
// four for the latents', and one for the key's rope dims.
template <int kTokens, int kWarps, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    NormLatentsKernel(const __grid_constant__ LatentArgs args, const int num_query_groups) {
  __shared__ float group_sums[kTokens][kWarps];
  __shared__ float group_maxima[kTokens][kLatentGroups];  // of latents times weights
  LetNextBegin();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const bool is_query = warp < num_query_groups;
  const bool is_rope = warp == num_query_groups + kLatentGroups;
  const int group = is_query ? warp : warp - num_query_groups;
  const int column = group * kQuantGroup + 4 * lane;
  const int size = is_query ? args.q_dim : kLatentDim;
  const bool is_inside = !is_rope && column < size;
  float4 weight = {0, 0, 0, 0};
  if (is_inside) {
    weight = *reinterpret_cast<const float4*>(
        (is_query ? args.q_a_layernorm : args.kv_a_layernorm) + column);
  }
  const int first_token = blockIdx.x * kTokens;
  WaitForPrevious();

  // All that is read, before anything is written: the compiler keeps to that order.
  const int64_t stride = args.q_dim + kKeyDim;
  float4 values[kTokens];
  int64_t slots[kTokens];
  int positions[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = first_token + i;
    const __nv_bfloat16* row = args.qkv_a + token * stride + (is_query ? 0 : args.q_dim);
    values[i] = {0, 0, 0, 0};
    slots[i] = -1;
    positions[i] = 0;
    if (token >= args.num_tokens) continue;
    if (is_inside) values[i] = UnpackBf16(*reinterpret_cast<const uint2*>(row + column));
    if (!is_query) slots[i] = args.slots[token];
    if (is_rope) positions[i] = args.positions[token];
  }
  const bool fp8 = args.cache.format == CacheFormat::kFp8;
  RopePair pairs[kTokens];
  if (is_rope) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if (slots[i] >= 0) {
        pairs[i] = LoadPair(args.rope, positions[i],
                            args.qkv_a + (first_token + i) * stride + args.q_dim + kLatentDim);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const float sum = GroupSquareSum(values[i]);
      if (lane == 0) group_sums[i][warp] = sum;
      if (is_query || !fp8) continue;
      const float amax = WarpAbsMax(Normed(values[i], 1, weight));
      if (lane == 0) group_maxima[i][group] = amax;
    }
  }
  __syncthreads();

  const int first_warp = is_query ? 0 : num_query_groups;
  const int num_warps = is_query ? num_query_groups : kLatentGroups;
  float factors[kTokens];
#pragma unroll
  for (int i = 0; i < kTokens; ++i)
    factors[i] = NormFactor(&group_sums[i][first_warp], num_warps, size, args.eps);
#pragma unroll
  for (int i = 0; i < kTokens; ++i) {
    const int64_t token = first_token + i;
    if (is_query) {
      if (token < args.num_tokens) {
        StoreGroup(args.q_out, token, args.q_dim, group, Normed(values[i], factors[i], weight),
                   args.power_of_two_scales);
      }
      continue;
    }
    if (slots[i] < 0) continue;
    const float scale = fp8 ? CacheScale(group_maxima[i], factors[i]) : 1;
    if (is_rope) {
      StoreCacheRope(args.cache, slots[i], pairs[i], scale);
    } else {
      StoreCacheLatents(args.cache, slots[i], column, Normed(values[i], factors[i], weight), scale);
    }
  }
}

constexpr int kRopeWarps = 8;
constexpr int kHeadsAtOnce = 8;  // of a warp
constexpr int kNopeDim = 128;
constexpr int kHeadDim = kNopeDim + kRopeDim;

__global__ void __launch_bounds__(kRopeWarps * 32)
    RopeQueryKernel(__nv_bfloat16* q, int64_t q_stride, int num_tokens, int num_heads,
                    const RopeTable rope, const int32_t* positions) {
  LetNextBegin();
  const int warps_of_token = (num_heads + kHeadsAtOnce - 1) / kHeadsAtOnce;
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * kRopeWarps + static_cast<int>(threadIdx.x / 32);
  const int64_t token = warp / warps_of_token;
  const int first_head = static_cast<int>(warp % warps_of_token) * kHeadsAtOnce;
  WaitForPrevious();
  if (token >= num_tokens) return;
  const int64_t position = positions[token];
  __nv_bfloat16* head = q + token * q_stride + first_head * kHeadDim + kNopeDim;
  const int heads = min(kHeadsAtOnce, num_heads - first_head);
  RopePair pairs[kHeadsAtOnce];
#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    if (i < heads) pairs[i] = LoadPair(rope, position, head + i * kHeadDim);
  }
  __syncwarp();  // a pair's place is another lane's pair
#pragma unroll
  for (int i = 0; i < kHeadsAtOnce; ++i) {
    if (i < heads) StorePair(pairs[i], head + i * kHeadDim);
  }
}

// From here on a block takes four tokens, if q_lora_rank is no more than DeepSeek-V3's: what it has
// in flight at once matters more than how soon one token is done.
constexpr int kManyTokens = 512;
constexpr int kManyTokensWarps = 1536 / kQuantGroup + kLatentGroups + 1;

}  // namespace

cudaError_t NormLatents(const LatentArgs& args, cudaStream_t stream) {
  const bool has_query = args.q_a_layernorm != nullptr;
  if (args.num_tokens < 0 || args.q_dim <= 0 || args.q_dim % 8 != 0 || args.qkv_a == nullptr ||
      args.kv_a_layernorm == nullptr || !IsSet(args.rope) || args.positions == nullptr ||
      args.slots == nullptr || args.cache.data == nullptr ||
      args.cache.format == CacheFormat::kF32 ||
      (has_query && (args.q_dim > kMaxQueryGroups * kQuantGroup ||
                     !CanStore(args.q_out, args.num_tokens, args.q_dim)))) {
    return cudaErrorInvalidValue;
  }
  if (args.num_tokens == 0) return cudaSuccess;
  const int num_query_groups = has_query ? (args.q_dim + kQuantGroup - 1) / kQuantGroup : 0;
  const int num_warps = num_query_groups + kLatentGroups + 1;
  LaunchShape shape;
  shape.block = dim3(32 * num_warps);
  if (args.num_tokens < kManyTokens || num_warps > kManyTokensWarps) {
    shape.grid = dim3(args.num_tokens);
    return Launch(NormLatentsKernel<1, kMaxWarps, 1>, shape, stream, args, num_query_groups);
  }
  shape.grid = dim3((args.num_tokens + 3) / 4);
  return Launch(NormLatentsKernel<4, kManyTokensWarps, 2>, shape, stream, args, num_query_groups);
}

cudaError_t RopeQuery(__nv_bfloat16* q, int64_t q_stride, int num_tokens, int num_heads,
                      const RopeTable& rope, const int32_t* positions, cudaStream_t stream) {
  if (q == nullptr || num_tokens < 0 || num_heads <= 0 || q_stride < num_heads * kHeadDim ||
      q_stride % 4 != 0 || !IsSet(rope) || positions == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (num_tokens == 0) return cudaSuccess;
  const int64_t num_warps =
      static_cast<int64_t>(num_tokens) * ((num_heads + kHeadsAtOnce - 1) / kHeadsAtOnce);
  LaunchShape shape;
  shape.grid = dim3(static_cast<unsigned>((num_warps + kRopeWarps - 1) / kRopeWarps));
  shape.block = dim3(kRopeWarps * 32);
  return Launch(RopeQueryKernel, shape, stream, q, q_stride, num_tokens, num_heads, rope,
                positions);
}

}  // namespace latentd
