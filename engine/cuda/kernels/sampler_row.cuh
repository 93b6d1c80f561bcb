#ifndef LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_ROW_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_ROW_CUH_

#include <cstdint>

#include "engine/cuda/kernels/cluster.cuh"

// A row of logits in the shared memory of a cluster of thread blocks, and the weights of its
// tokens.
//
// Weights are integers: exp(...) in f64, in units of 2^-46 (more for vocabularies beyond 2^17).
// Their sums are exact and the same in any order, which is what makes a row's draw the same on any
// number of threads; against sums in f64 they differ by 10^-11.
namespace latentd::sampler {

constexpr int kBlocks = 8;  // of a row's cluster
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBuckets = 2048;
constexpr int kOwned = kBuckets / kBlocks;  // buckets of all blocks that a block adds up
constexpr int kLimbBits = 16, kLimbs = 3;
constexpr double kLowestExponent = -45.0;
constexpr uint32_t kAllSuppressedKey = 0x007fffffu;  // OrderedKey(-infinity)
static_assert(kOwned <= kThreads);

// Orders floats as integers: the larger value, the larger key.
__device__ __forceinline__ uint32_t OrderedKey(float value) {
  const uint32_t bits = __float_as_uint(value);
  return bits ^ (bits >> 31 != 0 ? ~0u : 0x80000000u);
}
__device__ __forceinline__ float ValueOfKey(uint32_t key) {
  return __uint_as_float(key ^ (key >> 31 != 0 ? 0x80000000u : ~0u));
}

// What the blocks of a cluster tell each other: slot i is written by block i, into the memory of
// all.
struct Mailbox {
  uint64_t best[kBlocks];  // of the largest logit: key << 32 | ~id
  uint32_t not_finite[kBlocks];
  uint64_t sum[kBlocks];       // FindBucket()'s; a slow block may still read them when
  uint64_t draw_sum[kBlocks];  // a fast one writes these
  uint32_t count[kBlocks];
  uint32_t last_id;  // by the block that has it
};

// The end of a prefix within a histogram's buckets.
struct Bucket {
  uint32_t index, count;
  uint64_t before, sum;  // of the buckets before it; its own
};

struct Shared {
  Mailbox mailbox;
  alignas(16) uint32_t histogram[kLimbs + 1][kBuckets];  // the limbs of weights, then counts
  // Of this block's share of the buckets, over all blocks.
  uint64_t owned_sum[kOwned], owned_through[kOwned];
  uint32_t owned_count[kOwned];
  Bucket found;
  uint64_t warp_sums[kWarps];
  uint32_t warp_counts[kWarps];
};

// A prefix of the order (coarse bucket up, key down, id up), which is (logit down, id up): the last
// token that is kept, or any place behind it.
struct Kept {
  uint32_t bucket, key, last_id;
  // The same, but for what is close: logits above `surely` are kept, those below `least` are not.
  float surely, least;
};

// A block's part of one row.
struct Row {
  const float* values;  // [size, rounded up to 4] in shared memory; -infinity behind size
  int size;
  uint32_t first_id;
  Shared* shared;
  uint32_t rank;  // of the block
  double largest, log2_scale, unit;
  float largest_f32, bucket_scale;

  // The distance from the largest logit, at most 45 times the temperature, in kBuckets steps.
  __device__ __forceinline__ uint32_t CoarseBucket(float value) const {
    const float distance = (largest_f32 - value) * bucket_scale;
    return min(static_cast<uint32_t>(fminf(distance, kBuckets)), kBuckets - 1u);
  }
  __device__ __forceinline__ bool Keeps(const Kept& kept, float value, int i) const {
    if (value > kept.surely) return true;
    if (value < kept.least) return false;
    const uint32_t bucket = CoarseBucket(value);
    if (bucket != kept.bucket) return bucket < kept.bucket;
    const uint32_t key = OrderedKey(value);
    return key > kept.key || (key == kept.key && first_id + i <= kept.last_id);
  }
  // exp((value - largest) / temperature) in units, rounded down. `value` is a
  // candidate's.
  __device__ __forceinline__ uint64_t Units(float value) const {
    // 2^y = 2^n 2^r. Adding 1.5 * 2^52 rounds to an integer, which then is in the low bits.
    constexpr double kRound = 6755399441055744.0, kOne52 = 4503599627370496.0;
    const double distance = static_cast<double>(value) - largest;
    const double rounded = fma(distance, log2_scale, kRound);
    const int n = __double2loint(rounded);
    const double r = fma(distance, log2_scale, kRound - rounded);
    // (2^r - 1) / r on [-1/2, 1/2]: an interpolation at Chebyshev nodes.
    double q = 7.074836893364958e-09;
    q = fma(q, r, 1.0206052976163383e-07);
    q = fma(q, r, 1.3215430656708457e-06);
    q = fma(q, r, 1.5252672270128203e-05);
    q = fma(q, r, 0.0001540353046369421);
    q = fma(q, r, 0.001333355820170124);
    q = fma(q, r, 0.00961812910759075);
    q = fma(q, r, 0.05550410866464737);
    q = fma(q, r, 0.24022650695910144);
    q = fma(q, r, 0.6931471805599465);
    const double units = fma(fma(q, r, 1.0), unit, kOne52);
    const uint64_t bits =
        static_cast<uint64_t>(__double_as_longlong(units)) & ((uint64_t{1} << 52) - 1);
    return bits >> min(-n, 63);
  }
};

// Calls take(value, i) for each of the block's logits.
template <typename Take>
__device__ __forceinline__ void ForEach(const Row& row, const Take& take) {
#pragma unroll 1
  for (int i = 4 * threadIdx.x; i < row.size; i += 4 * kThreads) {
    const float4 four = *reinterpret_cast<const float4*>(row.values + i);
    take(four.x, i);
    take(four.y, i + 1);
    take(four.z, i + 2);
    take(four.w, i + 3);
  }
}

__device__ __forceinline__ uint64_t WarpSum(uint64_t value) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) value += __shfl_xor_sync(~0u, value, d);
  return value;
}
__device__ __forceinline__ uint64_t WarpInclusiveScan(uint64_t value) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const uint64_t below = __shfl_up_sync(~0u, value, d);
    if (threadIdx.x % 32 >= d) value += below;
  }
  return value;
}

}  // namespace latentd::sampler

#endif  // LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_ROW_CUH_
