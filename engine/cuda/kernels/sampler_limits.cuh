#ifndef LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_LIMITS_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_LIMITS_CUH_

#include <climits>
#include <cstdint>

#include "engine/cuda/kernels/cluster.cuh"
#include "engine/cuda/kernels/sampler_row.cuh"

// top_k and top_p keep a prefix of the order (logit down, id up), which is found without sorting: a
// histogram over the distance from the largest logit tells the bucket in which the prefix ends,
// then ever finer ones over the bits of the logits in that bucket; among equal logits ids are
// counted.
namespace latentd::sampler {

template <bool kWeights>
__device__ __forceinline__ void ClearHistogram(Shared& shared) {
  constexpr int kFirst = kWeights ? 0 : kLimbs;
  auto* to = reinterpret_cast<uint4*>(&shared.histogram[kFirst][0]);
#pragma unroll
  for (int i = 0; i < (kLimbs + 1 - kFirst) * kBuckets / 4 / kThreads; ++i) {
    to[threadIdx.x + i * kThreads] = make_uint4(0, 0, 0, 0);
  }
  __syncthreads();
}
template <bool kWeights>
__device__ __forceinline__ void AddToHistogram(const Row& row, uint32_t bucket, float value) {
  auto& histogram = row.shared->histogram;
  atomicAdd(&histogram[kLimbs][bucket], 1u);
  if constexpr (kWeights) {
    const uint64_t units = row.Units(value);
#pragma unroll
    for (int limb = 0; limb < kLimbs; ++limb) {
      const uint32_t part =
          static_cast<uint32_t>(units >> (limb * kLimbBits)) & ((1u << kLimbBits) - 1);
      if (part != 0) atomicAdd(&histogram[limb][bucket], part);
    }
  }
}

// Adds the histograms of all blocks and finds the bucket in which the running sum (of weights, or
// counts) reaches need(sum of all), which must be within [1, sum of all]. need() returns 0 for no
// limit: then the result's count is 0.
template <bool kWeights, typename Need>
__device__ __forceinline__ Bucket FindBucket(const Row& row, const Need& need) {
  Shared& shared = *row.shared;
  Mailbox& mailbox = shared.mailbox;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ClusterSync();  // all histograms are complete
  uint64_t sum = 0;
  uint32_t count = 0;
  if (threadIdx.x < kOwned) {
    const uint32_t bucket = row.rank * kOwned + threadIdx.x;
#pragma unroll
    for (uint32_t block = 0; block < kBlocks; ++block) {
      count += LoadRemote(&shared.histogram[kLimbs][bucket], block);
      if constexpr (kWeights) {
#pragma unroll
        for (int limb = 0; limb < kLimbs; ++limb) {
          sum += uint64_t{LoadRemote(&shared.histogram[limb][bucket], block)} << (limb * kLimbBits);
        }
      }
    }
    if constexpr (!kWeights) sum = count;
  }
  uint64_t through = WarpInclusiveScan(sum);
  if (lane == 31) shared.warp_sums[warp] = through;
  __syncthreads();
  if (threadIdx.x < kOwned) {
#pragma unroll 1
    for (int w = 0; w < warp; ++w) through += shared.warp_sums[w];
    shared.owned_sum[threadIdx.x] = sum;
    shared.owned_through[threadIdx.x] = through;
    shared.owned_count[threadIdx.x] = count;
  }
  if (threadIdx.x == kOwned - 1) {
#pragma unroll 1
    for (uint32_t block = 0; block < kBlocks; ++block) {
      StoreRemote(&mailbox.sum[row.rank], block, through);
    }
  }
  ClusterSync();
  uint64_t total = 0;
#pragma unroll
  for (uint32_t block = 0; block < kBlocks; ++block) total += mailbox.sum[block];
  const uint64_t wanted = need(total);
  if (wanted == 0) return {0, 0, 0, 0};
  uint32_t owner = 0;
  uint64_t before = 0;
#pragma unroll 1
  while (before + mailbox.sum[owner] < wanted) before += mailbox.sum[owner++];
  if (threadIdx.x < kOwned) {
    sum = LoadRemote(&shared.owned_sum[threadIdx.x], owner);
    through = LoadRemote(&shared.owned_through[threadIdx.x], owner);
    count = LoadRemote(&shared.owned_count[threadIdx.x], owner);
    before += through - sum;
    if (before < wanted && wanted <= before + sum) {
      shared.found = {owner * kOwned + threadIdx.x, count, before, sum};
    }
  }
  __syncthreads();
  return shared.found;
}

// The id of the `wanted`-th (from 1) kept token whose key is `key`.
__device__ __forceinline__ uint32_t IdOfTie(const Row& row, const Kept& kept, uint32_t key,
                                            uint64_t wanted) {
  Shared& shared = *row.shared;
  Mailbox& mailbox = shared.mailbox;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int segment = (row.size + kThreads - 1) / kThreads * 32;  // of a warp
  const int begin = min(warp * segment, row.size), end = min(begin + segment, row.size);
  const auto is_tie = [&](int i) {
    return i < end && OrderedKey(row.values[i]) == key && row.Keeps(kept, row.values[i], i);
  };
  uint32_t count = 0;
#pragma unroll 1
  for (int i = begin; i < end; i += 32) count += __popc(__ballot_sync(~0u, is_tie(i + lane)));
  if (lane == 0) shared.warp_counts[warp] = count;
  __syncthreads();
  if (threadIdx.x < kBlocks) {
    uint32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += shared.warp_counts[w];
    StoreRemote(&mailbox.count[row.rank], threadIdx.x, sum);
  }
  ClusterSync();
  uint64_t before = 0;
  for (uint32_t block = 0; block < row.rank; ++block) before += mailbox.count[block];
  for (int w = 0; w < warp; ++w) before += shared.warp_counts[w];
  if (before < wanted && wanted <= before + count) {
#pragma unroll 1
    for (int i = begin; i < end; i += 32) {
      const uint32_t ties = __ballot_sync(~0u, is_tie(i + lane));
      const uint32_t here = __popc(ties);
      if (wanted <= before + here) {
        const uint32_t through = __popc(ties & (~0u >> (31 - lane)));
        if ((ties >> lane & 1) != 0 && before + through == wanted) {
          for (uint32_t block = 0; block < kBlocks; ++block) {
            StoreRemote(&mailbox.last_id, block, row.first_id + i + lane);
          }
        }
        break;
      }
      before += here;
    }
  }
  ClusterSync();
  return mailbox.last_id;
}

// The shortest prefix of `kept` whose sum (of weights, or counts) is at least need(sum of `kept`);
// `kept` when need() is 0.
template <bool kWeights, typename Need>
__device__ __forceinline__ Kept ShortestPrefix(const Row& row, const Kept& kept, const Need& need) {
  ClearHistogram<kWeights>(*row.shared);
  ForEach(row, [&](float value, int i) {
    if (row.Keeps(kept, value, i)) AddToHistogram<kWeights>(row, row.CoarseBucket(value), value);
  });
  uint64_t wanted = 0;
  Bucket end = FindBucket<kWeights>(row, [&](uint64_t total) { return wanted = need(total); });
  if (end.count == 0) return kept;
  wanted -= end.before;

  // The prefix ends among the end.count tokens of the coarse bucket with keys in [low, high], whose
  // sum is end.sum, when they have given `wanted`. At first the range is all that rounding in
  // CoarseBucket() leaves possible.
  const uint32_t coarse = end.index;
  const float width = 1.0f / row.bucket_scale;
  const float slack = (fabsf(row.largest_f32) + 2048.0f * width) * 0x1p-20f;
  uint32_t high = OrderedKey(row.largest_f32 - coarse * width + slack + 0.0f);
  uint32_t low = coarse == kBuckets - 1
                     ? OrderedKey(-INFINITY)
                     : OrderedKey(row.largest_f32 - (coarse + 1) * width - slack + 0.0f);
  while (low < high && end.count > 1 && wanted != end.sum) {
    const int shift = max(0, 32 - __clz(high - low) - 11);
    ClearHistogram<kWeights>(*row.shared);
    ForEach(row, [&](float value, int i) {
      const uint32_t key = OrderedKey(value);
      if (key >= low && key <= high && row.CoarseBucket(value) == coarse &&
          row.Keeps(kept, value, i)) {
        AddToHistogram<kWeights>(row, (high - key) >> shift, value);
      }
    });
    end = FindBucket<kWeights>(row, [&](uint64_t) { return wanted; });
    wanted -= end.before;
    high -= end.index << shift;
    low = max(low, high - min(high, (1u << shift) - 1));
  }
  uint32_t last_id = UINT_MAX;
  if (end.count > 1 && wanted != end.sum) {
    const uint64_t each = end.sum / end.count;  // equal logits: equal weights
    const uint64_t tokens = (wanted + each - 1) / each;
    if (tokens < end.count) last_id = IdOfTie(row, kept, low, tokens);
  }
  if (last_id == UINT_MAX && coarse == kept.bucket && low <= kept.key) return kept;
  const float least = ValueOfKey(low);
  return {coarse, low, last_id, least + 3.0f * slack, least};
}

}  // namespace latentd::sampler

#endif  // LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_LIMITS_CUH_
