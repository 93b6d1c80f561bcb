// The steps around the attention of long chunks. Both kernels are bound by bytes: a gathered key is
// 1.1 KB read and 1 KB + 128 B a head written, a merged row 516 B read and 260 B written.

#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mla_prefill.h"

namespace latentd {
namespace {

constexpr int kBlockTokens = kMlaBlockKeys;
constexpr int kLatentDim = kMlaLatentDim;
constexpr int kRopeDim = kMlaRopeDim;
constexpr int kNopeDim = 128;
constexpr int kKeyDim = kNopeDim + kRopeDim;
constexpr int kValueDim = 128;

constexpr int kVector = sizeof(uint4) / sizeof(__nv_bfloat16);
constexpr int kLatentVectors = kLatentDim / kVector;
constexpr int kRopeVectors = kRopeDim / kVector;

constexpr int kGatherThreads = 128;
constexpr int kMergeThreads = 256;
constexpr int kMergeLanes = kValueDim / kVector;  // threads that share a row

// The sequence that a row of the part belongs to: the last that begins at or before it.
__device__ const PrefillKeys& FindSequence(const PrefillKeys* __restrict__ sequences, int count,
                                           int row) {
  int low = 0;
  while (count > 1) {
    const int half = count / 2;
    if (sequences[low + half].row_begin <= row) low += half;
    count -= half;
  }
  return sequences[low];
}

// 8 elements, `scale` times what is stored: exactly, as it is a power of two.
__device__ uint4 WidenFp8(uint2 stored, float scale) {
  const auto widen = [scale](uint32_t pair) {
    const __half2 half(
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3));
    const float2 value = __half22float2(half);
    const __nv_bfloat162 wide = __floats2bfloat162_rn(value.x * scale, value.y * scale);
    return reinterpret_cast<const uint32_t&>(wide);
  };
  return make_uint4(widen(stored.x & 0xffff), widen(stored.x >> 16), widen(stored.y & 0xffff),
                    widen(stored.y >> 16));
}
__device__ uint4 ScaleBf16(uint4 stored, float scale) {
  const auto times = [scale](uint32_t pair) {
    const float2 value = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
    const __nv_bfloat162 scaled = __floats2bfloat162_rn(value.x * scale, value.y * scale);
    return reinterpret_cast<const uint32_t&>(scaled);
  };
  return make_uint4(times(stored.x), times(stored.y), times(stored.z), times(stored.w));
}

// A token's row of the cache in bf16, in pieces of 8 elements. slot < 0: zeros.
class CacheRow {
 public:
  __device__ CacheRow(const MlaCache& cache, int64_t slot)
      : cache_(cache), slot_(slot), fp8_(cache.format == CacheFormat::kFp8) {
    if (fp8_ && slot >= 0)
      scale_ = *reinterpret_cast<const float*>(cache.data + MlaFp8ScaleOffset(slot));
  }
  __device__ uint4 Latents(int piece) const {
    if (slot_ < 0) return make_uint4(0, 0, 0, 0);
    if (!fp8_) return Bf16(MlaBf16Offset(slot_), piece);
    return WidenFp8(reinterpret_cast<const uint2*>(cache_.data + MlaFp8LatentsOffset(slot_))[piece],
                    scale_);
  }
  __device__ uint4 Rope(int piece) const {
    if (slot_ < 0) return make_uint4(0, 0, 0, 0);
    if (!fp8_) return Bf16(MlaBf16Offset(slot_), kLatentVectors + piece);
    return ScaleBf16(Bf16(MlaFp8RopeOffset(slot_), piece), scale_);
  }

 private:
  __device__ uint4 Bf16(int64_t offset, int piece) const {
    return reinterpret_cast<const uint4*>(cache_.data + offset)[piece];
  }

  const MlaCache cache_;
  const int64_t slot_;
  const bool fp8_;
  float scale_ = 1;
};

// One thread block a row.
__global__ void __launch_bounds__(kGatherThreads)
    GatherLatentsKernel(const GatherLatentsArgs args) {
  LetNextBegin();
  WaitForPrevious();
  const int row = static_cast<int>(blockIdx.x);
  const PrefillKeys& sequence = FindSequence(args.sequences, args.num_sequences, row);
  const int index = row - sequence.row_begin;
  int64_t slot = -1;
  if (index < sequence.num_keys) {
    const int key = args.key_offset + sequence.first_key + index;
    const int64_t block = args.blocks[sequence.block_begin + key / kBlockTokens];
    slot = block * kBlockTokens + key % kBlockTokens;
  }
  const CacheRow from(args.cache, slot);

  uint4* latents = reinterpret_cast<uint4*>(args.latents + int64_t{row} * kLatentDim);
  for (int i = static_cast<int>(threadIdx.x); i < kLatentVectors; i += kGatherThreads) {
    latents[i] = from.Latents(i);
  }
  // Each thread has the same piece of the rope key for all of its heads.
  static_assert(kGatherThreads % kRopeVectors == 0);
  const int piece = static_cast<int>(threadIdx.x) % kRopeVectors;
  const uint4 rope = from.Rope(piece);
  uint4* keys =
      reinterpret_cast<uint4*>(args.keys + int64_t{row} * args.num_heads * kKeyDim + kNopeDim) +
      piece;
  for (int head = static_cast<int>(threadIdx.x) / kRopeVectors; head < args.num_heads;
       head += kGatherThreads / kRopeVectors) {
    keys[head * (kKeyDim / kVector)] = rope;
  }
}

__device__ uint32_t MergePair(uint32_t a, uint32_t b, float weight_a, float weight_b) {
  const float2 x = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(a));
  const float2 y = __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(b));
  const __nv_bfloat162 merged =
      __floats2bfloat162_rn(weight_a * x.x + weight_b * y.x, weight_a * x.y + weight_b * y.y);
  return reinterpret_cast<const uint32_t&>(merged);
}

__global__ void __launch_bounds__(kMergeThreads)
    MergeAttentionKernel(const MergeAttentionArgs args) {
  LetNextBegin();
  WaitForPrevious();
  const int64_t thread = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  const int64_t row = thread / kMergeLanes;
  if (row >= args.num_rows) return;
  const float lse = args.lse[row], other_lse = args.other_lse[row];
  const float max = fmaxf(lse, other_lse);
  const float scale = exp2f(lse - max), other_scale = exp2f(other_lse - max);
  const float sum = scale + other_scale;
  const float weight = scale / sum, other_weight = other_scale / sum;

  uint4* out = reinterpret_cast<uint4*>(args.out) + thread;
  const uint4 a = *out, b = reinterpret_cast<const uint4*>(args.other)[thread];
  *out = make_uint4(
      MergePair(a.x, b.x, weight, other_weight), MergePair(a.y, b.y, weight, other_weight),
      MergePair(a.z, b.z, weight, other_weight), MergePair(a.w, b.w, weight, other_weight));
  // All lanes of the row have read it: they are in one warp.
  __syncwarp(__activemask());
  if (thread % kMergeLanes == 0) args.lse[row] = max + log2f(sum);
}

}  // namespace

cudaError_t GatherLatents(const GatherLatentsArgs& args, cudaStream_t stream) {
  if (args.num_rows < 1 || args.num_heads < 1 || args.num_sequences < 1 ||
      args.cache.format == CacheFormat::kF32) {
    return cudaErrorInvalidValue;
  }
  return Launch(GatherLatentsKernel,
                {.grid = dim3(static_cast<unsigned>(args.num_rows)), .block = dim3(kGatherThreads)},
                stream, args);
}

cudaError_t MergeAttention(const MergeAttentionArgs& args, cudaStream_t stream) {
  if (args.num_rows < 1) return cudaErrorInvalidValue;
  const int64_t blocks = (args.num_rows * kMergeLanes + kMergeThreads - 1) / kMergeThreads;
  return Launch(MergeAttentionKernel,
                {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kMergeThreads)}, stream,
                args);
}

}  // namespace latentd
