// Draws a token from each row of logits. A cluster of eight blocks has a row in its shared memory:
// the logits are read once, and all that follows (limits, sums, draw) is passes over shared memory
// with a barrier of the cluster between them. Bound by the bytes of the logits, then by f64.

#include <algorithm>
#include <climits>

#include "engine/cuda/kernels/cluster.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/sampler.h"
#include "engine/cuda/kernels/sampler_limits.cuh"
#include "engine/cuda/kernels/sampler_row.cuh"

namespace latentd {
namespace {

using namespace sampler;  // NOLINT(google-build-using-namespace)

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
