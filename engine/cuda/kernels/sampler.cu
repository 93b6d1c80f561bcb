// Draws a token from each row of logits. A cluster of eight blocks has a row in its shared memory:
// the logits are read once, and all that follows (limits, sums, draw) is passes over shared memory
// with a barrier of the cluster between them. Bound by the bytes of the logits, then by f64.
//
// Weights are integers: exp(...) in f64, in units of 2^-46 (more for vocabularies beyond 2^17).
// Their sums are exact and the same in any order, which is what makes a row's draw the same on any
// number of threads; against sums in f64 they differ by 10^-11.
//
// top_k and top_p keep a prefix of the order (logit down, id up), which is found without sorting: a
// histogram over the distance from the largest logit tells the bucket in which the prefix ends,
// then ever finer ones over the bits of the logits in that bucket; among equal logits ids are
// counted.

#include <algorithm>
#include <climits>

#include "engine/cuda/kernels/cluster.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/sampler.h"

namespace latentd {
namespace {

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

// UniformDraw() of engine/sampling.h, as the integer of 53 bits that it is a multiple of 2^-53 of.
__device__ uint64_t DrawBits(uint64_t seed, int32_t sample_index, int64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position),
           c1 = static_cast<uint32_t>(static_cast<uint64_t>(position) >> 32);
  uint32_t c2 = static_cast<uint32_t>(sample_index), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0, product1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return (uint64_t{c1} << 32 | c0) >> 11;
}

struct KernelArgs {
  SampleArgs sample;
  int chunk;        // tokens of a block, a multiple of 4
  int weight_bits;  // a weight of 1 is 1 << weight_bits
};

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

// The token at which the running sum of weights, in the order of ids, passes the draw's share of
// their sum.
__device__ __forceinline__ void Draw(const Row& row, const Kept& kept, const SampleRow& params,
                                     int32_t* sampled) {
  Shared& shared = *row.shared;
  Mailbox& mailbox = shared.mailbox;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint64_t least = __double2ull_rd(params.min_p * row.unit);
  const auto units_of = [&](float value, int i) -> uint64_t {
    if (!row.Keeps(kept, value, i)) return 0;
    const uint64_t units = row.Units(value);
    return units < least ? 0 : units;
  };
  const int segment = (row.size + 4 * kThreads - 1) / (4 * kThreads) * 128;  // of a warp
  uint64_t sum = 0;
#pragma unroll 1
  for (int i = warp * segment + 4 * lane; i < min((warp + 1) * segment, row.size); i += 128) {
    const float4 four = *reinterpret_cast<const float4*>(row.values + i);
    sum += units_of(four.x, i) + units_of(four.y, i + 1) + units_of(four.z, i + 2) +
           units_of(four.w, i + 3);
  }
  sum = WarpSum(sum);
  if (lane == 0) shared.warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x < kBlocks) {
    uint64_t block_sum = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) block_sum += shared.warp_sums[w];
    StoreRemote(&mailbox.draw_sum[row.rank], threadIdx.x, block_sum);
  }
  ClusterSync();
  uint64_t before = 0, total = 0;
#pragma unroll
  for (uint32_t block = 0; block < kBlocks; ++block) {
    if (block < row.rank) before += mailbox.draw_sum[block];
    total += mailbox.draw_sum[block];
  }
  // floor(draw * total): an integer running sum passes the one when it passes the other.
  const uint64_t target =
      __umul64hi(DrawBits(params.seed, params.sample_index, params.position) << 11, total);
  if (target < before || target >= before + mailbox.draw_sum[row.rank]) return;

  // In this block. Which warp's segment, then which token of it.
  int begin = 0;
#pragma unroll 1
  while (target >= before + shared.warp_sums[begin]) before += shared.warp_sums[begin++];
  begin *= segment;
  __syncthreads();  // warp_sums is read
#pragma unroll 1
  for (int base = 0; base < segment; base += kThreads) {
    const int at = base + static_cast<int>(threadIdx.x), i = begin + at;
    const uint64_t own = at < segment && i < row.size ? units_of(row.values[i], i) : 0;
    uint64_t through = WarpInclusiveScan(own);
    if (lane == 31) shared.warp_sums[warp] = through;
    __syncthreads();
    uint64_t all = 0;
#pragma unroll 1
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp) through += before + all;
      all += shared.warp_sums[w];
    }
    if (through - own <= target && target < through) {
      *sampled = static_cast<int32_t>(row.first_id) + i;
    }
    before += all;
    __syncthreads();
  }
}

// Block `rank` of cluster r: tokens [rank * chunk, + chunk) of row r.
__global__ void __launch_bounds__(kThreads, 2) Sample(KernelArgs args) {
  extern __shared__ __align__(16) unsigned char dynamic[];
  Shared& shared = *reinterpret_cast<Shared*>(dynamic);
  float* values = reinterpret_cast<float*>(dynamic + sizeof(Shared));
  Mailbox& mailbox = shared.mailbox;
  ClusterArrive();
  WaitForPrevious();
  LetNextBegin();

  const uint32_t rank = ClusterRank();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row_index = blockIdx.x / kBlocks;
  const int vocab_size = args.sample.vocab_size;
  const int first = min(static_cast<int>(rank) * args.chunk, vocab_size),
            size = min(args.chunk, vocab_size - first);
  const float* logits = args.sample.logits + static_cast<int64_t>(row_index) * vocab_size + first;
  const SampleRow params = args.sample.rows[row_index];

  // Into shared memory, -0 as the 0 that it equals; the largest on the way, the lowest id among
  // equals.
  uint32_t bad = 0, best_id = 0;
  float best_value = -INFINITY;
  const auto take = [&](float value, int i) {
    bad |= (__float_as_uint(value) & 0x7f800000u) == 0x7f800000u;
    if (value > best_value) {
      best_value = value;
      best_id = static_cast<uint32_t>(first + i);
    }
    return value + 0.0f;
  };
  if (vocab_size % 4 == 0) {
#pragma unroll 8
    for (int i = 4 * threadIdx.x; i < size; i += 4 * kThreads) {
      const float4 four = __ldcs(reinterpret_cast<const float4*>(logits + i));
      *reinterpret_cast<float4*>(values + i) = make_float4(
          take(four.x, i), take(four.y, i + 1), take(four.z, i + 2), take(four.w, i + 3));
    }
  } else {
#pragma unroll 4
    for (int i = threadIdx.x; i < size; i += kThreads) values[i] = take(__ldcs(logits + i), i);
    if (threadIdx.x < 3 && size + static_cast<int>(threadIdx.x) < (size + 3) / 4 * 4) {
      values[size + threadIdx.x] = -INFINITY;
    }
  }
  if (params.suppressed_begin < params.suppressed_end) {
    __syncthreads();
#pragma unroll 1
    for (int i = params.suppressed_begin + static_cast<int>(threadIdx.x); i < params.suppressed_end;
         i += kThreads) {
      const int at = args.sample.suppressed[i] - first;
      if (at >= 0 && at < size) values[at] = -INFINITY;
    }
    __syncthreads();
    best_value = -INFINITY;
#pragma unroll 1
    for (int i = threadIdx.x; i < size; i += kThreads) {
      if (values[i] > best_value) {
        best_value = values[i];
        best_id = static_cast<uint32_t>(first + i);
      }
    }
  }
  uint64_t best = uint64_t{OrderedKey(best_value + 0.0f)} << 32 | ~best_id;
#pragma unroll
  for (int d = 16; d > 0; d /= 2) best = max(best, __shfl_xor_sync(~0u, best, d));
  bad = __any_sync(~0u, bad);
  if (lane == 0) {
    shared.warp_sums[warp] = best;
    shared.warp_counts[warp] = bad;
  }
  __syncthreads();
  ClusterWait();  // the other blocks have begun
  if (threadIdx.x < kBlocks) {
    for (int w = 0; w < kWarps; ++w) {
      best = max(best, shared.warp_sums[w]);
      bad |= shared.warp_counts[w];
    }
    StoreRemote(&mailbox.best[rank], threadIdx.x, best);
    StoreRemote(&mailbox.not_finite[rank], threadIdx.x, bad);
  }
  ClusterSync();
  bad = 0;
  for (int block = 0; block < kBlocks; ++block) {
    best = max(best, mailbox.best[block]);
    bad |= mailbox.not_finite[block];
  }
  int32_t* sampled = args.sample.sampled + row_index;
  const uint32_t best_key = static_cast<uint32_t>(best >> 32);
  const bool all_suppressed = best_key <= kAllSuppressedKey;
  if (bad != 0 || all_suppressed || params.temperature == 0.0f) {
    if (rank == 0 && threadIdx.x == 0) {
      *sampled = bad != 0         ? kNotFinite
                 : all_suppressed ? kAllSuppressed
                                  : static_cast<int32_t>(~static_cast<uint32_t>(best));
    }
    return;
  }

  const double temperature = params.temperature;
  const float largest = ValueOfKey(best_key);
  constexpr double kLog2E = 1.4426950408889634;
  const Row row = {.values = values,
                   .size = size,
                   .first_id = static_cast<uint32_t>(first),
                   .shared = &shared,
                   .rank = rank,
                   .largest = largest,
                   .log2_scale = kLog2E / temperature,
                   .unit = static_cast<double>(uint64_t{1} << args.weight_bits),
                   .largest_f32 = largest,
                   .bucket_scale = static_cast<float>(kBuckets / (-kLowestExponent * temperature))};
  // A logit is below a number in f64 if and only if it is below the next f32 above that.
  const float lowest = __double2float_ru(largest + kLowestExponent * temperature) + 0.0f;
  Kept kept = {kBuckets - 1, OrderedKey(lowest), UINT_MAX, lowest, lowest};
  if (params.top_k > 0 && params.top_k < vocab_size) {
    kept = ShortestPrefix<false>(row, kept, [&](uint64_t count) -> uint64_t {
      return params.top_k < count ? params.top_k : 0;
    });
  }
  if (params.top_p < 1.0f) {
    kept = ShortestPrefix<true>(row, kept, [&](uint64_t total) -> uint64_t {
      const uint64_t enough = __double2ull_ru(params.top_p * static_cast<double>(total));
      return min(max(enough, uint64_t{1}), total);
    });
  }
  Draw(row, kept, params, sampled);
}

}  // namespace

size_t SamplerWorkspaceBytes(int, int) { return 0; }  // a cluster's shared memory is enough

cudaError_t SampleTokens(const SampleArgs& args, cudaStream_t stream) {
  if (args.num_rows < 0 || args.vocab_size < 1 || args.vocab_size > kMaxVocabSize)
    return cudaErrorInvalidValue;
  if (args.num_rows == 0) return cudaSuccess;
  if (args.logits == nullptr || args.rows == nullptr || args.sampled == nullptr)
    return cudaErrorInvalidValue;
  KernelArgs kernel_args = {.sample = args,
                            .chunk = (args.vocab_size + 4 * kBlocks - 1) / (4 * kBlocks) * 4};
  // The sum of all weights has to fit into 63 bits.
  kernel_args.weight_bits = 46;
  while (kernel_args.weight_bits > 0 &&
         (int64_t{args.vocab_size} >> (63 - kernel_args.weight_bits)) > 0) {
    --kernel_args.weight_bits;
  }
  const size_t shared_bytes = sizeof(Shared) + kernel_args.chunk * sizeof(float);
  static_assert(sizeof(Shared) + kMaxVocabSize / kBlocks * sizeof(float) + 16 <= 227 * 1024);
  const cudaError_t error =
      cudaFuncSetAttribute(Sample, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  return Launch(Sample,
                {.grid = dim3(args.num_rows * kBlocks),
                 .block = dim3(kThreads),
                 .shared_bytes = shared_bytes,
                 .cluster = kBlocks},
                stream, kernel_args);
}

}  // namespace latentd
