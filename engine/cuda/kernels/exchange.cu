// RouteSlots, SumExperts, SumParts.
//
// RouteSlots is bound by latency: each block reads all ids (32 KB with 16 ranks of 64 tokens, from
// L2), counts what its rank's experts get of all tokens and of those before its own, and numbers
// its own tokens' rows. No block waits for another. SumExperts is bound by bytes: an expert's row
// is read once, a token's row is written once.

#include <algorithm>

#include "engine/cuda/kernels/exchange.h"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/quantize.cuh"

namespace latentd {
namespace {

constexpr int kNumSms = 132;
constexpr int kMaxExperts = kMaxRoutedExperts;
constexpr int kMaxChoices = kMaxExpertsPerTok;

// --- RouteSlots

constexpr int kRouteWarps = 8, kRouteThreads = 32 * kRouteWarps;
constexpr int kBlockTokens = 32;  // bits of a mask
constexpr int kUnitIds = 4 * 32;  // that a warp loads at once
constexpr int kBatch = 4;         // loads of a lane under way

__device__ __forceinline__ const int32_t* IdsOf(const RankSlots& slots, int rank) {
  return reinterpret_cast<const int32_t*>(reinterpret_cast<const char*>(slots.topk_ids) +
                                          rank * slots.slot_bytes);
}

struct RouteState {
  int total[kMaxExperts];      // rows of a local expert
  int before[kMaxExperts];     // of the tokens before this block's
  uint32_t mask[kMaxExperts];  // bit i: this block's token i chose it
  int warp_sums[kRouteWarps];
};

// Turns totals into the experts' first rows; returns the sum. All threads call it.
__device__ __forceinline__ int PrefixSums(RouteState& state, int num_local) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int sum = 0;
#pragma unroll 1
  for (int base = 0; base < num_local; base += kRouteThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    const int count = e < num_local ? state.total[e] : 0;
    int through = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(~0u, through, d);
      if (lane >= d) through += below;
    }
    __syncthreads();  // warp_sums of the experts before are read
    if (lane == 31) state.warp_sums[warp] = through;
    __syncthreads();
    int first = sum + through - count;
#pragma unroll
    for (int w = 0; w < kRouteWarps; ++w) {
      if (w < warp) first += state.warp_sums[w];
      sum += state.warp_sums[w];
    }
    if (e < num_local) state.total[e] = first;
  }
  __syncthreads();
  return sum;
}

// Counts what the rank's experts get, and notes what this block's tokens chose. A warp takes
// kUnitIds of a rank's ids at a time, four in a row for each lane.
__device__ __forceinline__ void ScanIds(const RouteSlotsArgs& args, int first_token,
                                        int block_tokens, RouteState& state,
                                        int16_t (*choices)[kMaxChoices]) {
  const RankSlots& slots = args.slots;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int k = args.num_experts_per_tok, rank_ids = slots.rows * k;
  const int rank_units = (rank_ids + kUnitIds - 1) / kUnitIds;
  const int num_units = slots.num_ranks * rank_units;
#pragma unroll 1
  for (int base = warp; base < num_units; base += kRouteWarps * kBatch) {
    int4 ids[kBatch];
    int ranks[kBatch], first[kBatch];  // of each four
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      const int unit = base + b * kRouteWarps;
      ranks[b] = unit / rank_units;
      first[b] = (unit - ranks[b] * rank_units) * kUnitIds + 4 * lane;
      ids[b] = {-1, -1, -1, -1};
      if (unit >= num_units || first[b] >= rank_ids) continue;
      const int32_t* from = IdsOf(slots, ranks[b]) + first[b];
      if (first[b] + 4 <= rank_ids) {
        ids[b] = *reinterpret_cast<const int4*>(from);
      } else {  // the last ones
        ids[b].x = from[0];
        if (first[b] + 1 < rank_ids) ids[b].y = from[1];
        if (first[b] + 2 < rank_ids) ids[b].z = from[2];
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (base + b * kRouteWarps >= num_units) break;
      int row = first[b] / k, choice = first[b] - row * k;
      const int four[4] = {ids[b].x, ids[b].y, ids[b].z, ids[b].w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int own = ranks[b] * slots.rows + row - first_token;
        const int e = four[i] - args.first_expert;
        const bool local = four[i] >= 0 && e >= 0 && e < args.num_local_experts;
        if (own >= 0 && own < block_tokens && first[b] + i < rank_ids) {
          choices[own][choice] = static_cast<int16_t>(local ? e : -1);
          if (local) atomicOr(&state.mask[e], 1u << own);
        }
        if (local) {
          atomicAdd(&state.total[e], 1);
          if (own < 0) atomicAdd(&state.before[e], 1);
        }
        if (++choice == k) {
          choice = 0;
          ++row;
        }
      }
    }
  }
}

__global__ void __launch_bounds__(kRouteThreads)
    RouteSlotsKernel(const __grid_constant__ RouteSlotsArgs args) {
  __shared__ RouteState state;
  __shared__ int16_t choices[kBlockTokens][kMaxChoices];
  const RankSlots& slots = args.slots;
  const MoeRouting& routing = args.routing;
  const int k = args.num_experts_per_tok, num_local = args.num_local_experts;
  const int num_tokens = slots.num_ranks * slots.rows, first_token = blockIdx.x * kBlockTokens;
  const int block_tokens = min(kBlockTokens, num_tokens - first_token);
  for (int e = threadIdx.x; e < num_local; e += kRouteThreads) {
    state.total[e] = state.before[e] = 0;
    state.mask[e] = 0;
  }
  __syncthreads();
  WaitForPrevious();
  LetNextBegin();

  const int num_real = min(max(*args.num_real_tokens, 0), slots.rows);
  ScanIds(args, first_token, block_tokens, state, choices);
  __syncthreads();
  const int routed_rows = PrefixSums(state, num_local);
  if (blockIdx.x == 0) {
    for (int g = threadIdx.x; g <= num_local + args.num_shared; g += kRouteThreads) {
      const int offset = g < num_local ? state.total[g] : routed_rows + (g - num_local) * num_real;
      routing.group_offsets[g] = min(offset, args.max_rows);
    }
  }
  const int own_first = args.own_rank * slots.rows;
#pragma unroll 1
  for (int i = threadIdx.x; i < block_tokens * routing.num_choices; i += kRouteThreads) {
    const int own = i / routing.num_choices, j = i % routing.num_choices;
    const int token = first_token + own;
    int row = -1;
    if (j < k) {
      const int e = choices[own][j];
      if (e >= 0) {
        row = state.total[e] + state.before[e] + __popc(state.mask[e] & ((1u << own) - 1));
      }
    } else if (token >= own_first && token < own_first + num_real) {
      row = routed_rows + (j - k) * num_real + token - own_first;
    }
    if (row >= args.max_rows) row = -1;
    routing.row_of[static_cast<int64_t>(token) * routing.num_choices + j] = row;
    if (row >= 0) routing.token_of_row[row] = token;
  }
}

bool Valid(const RankSlots& slots, int num_experts_per_tok) {
  return slots.num_ranks >= 1 && slots.rows >= 0 &&
         static_cast<int64_t>(slots.num_ranks) * slots.rows < (1 << 24) && slots.slot_bytes >= 0 &&
         slots.slot_bytes % 4 == 0 && slots.topk_ids != nullptr && slots.weights != nullptr &&
         num_experts_per_tok >= 1 && num_experts_per_tok <= kMaxChoices;
}

// --- SumExperts

constexpr int kSumThreads = 256;

struct Eight {
  float v[8];
};

__device__ __forceinline__ void AddBf16(Eight& sum, float weight, const uint4& packed) {
  const float4 low = UnpackBf16({packed.x, packed.y}), high = UnpackBf16({packed.z, packed.w});
  const float x[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
  for (int i = 0; i < 8; ++i) sum.v[i] = fmaf(weight, x[i], sum.v[i]);
}

__device__ __forceinline__ uint4 PackBf16(const Eight& sum) {
  uint4 packed;
  uint32_t* words = &packed.x;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(sum.v[2 * i], sum.v[2 * i + 1]);
    words[i] = *reinterpret_cast<const uint32_t*>(&pair);
  }
  return packed;
}

// A block has a token at a time.
__global__ void __launch_bounds__(kSumThreads)
    SumExpertsKernel(const __grid_constant__ SumExpertsArgs args) {
  __shared__ int rows[2 * kMaxChoices];
  __shared__ float weights[2 * kMaxChoices];
  __shared__ int count;
  WaitForPrevious();
  LetNextBegin();
  const RankSlots& slots = args.slots;
  const int num_tokens = slots.num_ranks * slots.rows, k = args.num_experts_per_tok;
  const int vectors = args.hidden_size / 8;
  for (int token = blockIdx.x; token < num_tokens; token += gridDim.x) {
    __syncthreads();  // the token before is done
    if (threadIdx.x < 32) {
      // The choices that this rank has, in their order.
      int found = 0;
      for (int base = 0; base < args.routing.num_choices; base += 32) {
        const int j = base + static_cast<int>(threadIdx.x);
        int row = -1;
        float weight = 1.0f;
        if (j < args.routing.num_choices) {
          row = args.routing.row_of[static_cast<int64_t>(token) * args.routing.num_choices + j];
          if (j < k && row >= 0) {
            const char* of_rank = reinterpret_cast<const char*>(slots.weights) +
                                  token / slots.rows * slots.slot_bytes;
            weight = reinterpret_cast<const float*>(of_rank)[token % slots.rows * k + j];
          }
        }
        const unsigned here = __ballot_sync(~0u, row >= 0);
        if (row >= 0) {
          const int at = found + __popc(here & ((1u << threadIdx.x) - 1));
          rows[at] = row;
          weights[at] = weight;
        }
        found += __popc(here);
      }
      if (threadIdx.x == 0) count = found;
    }
    __syncthreads();
    uint4* out =
        reinterpret_cast<uint4*>(args.out + static_cast<int64_t>(token) * args.hidden_size);
    for (int v = threadIdx.x; v < vectors; v += kSumThreads) {
      Eight sum = {};
#pragma unroll 4
      for (int i = 0; i < count; ++i) {
        const __nv_bfloat16* row =
            args.expert_out + static_cast<int64_t>(rows[i]) * args.hidden_size;
        AddBf16(sum, weights[i], reinterpret_cast<const uint4*>(row)[v]);
      }
      out[v] = PackBf16(sum);
    }
  }
}

// --- SumParts

__global__ void __launch_bounds__(kSumThreads)
    SumPartsKernel(const __grid_constant__ SumPartsArgs args) {
  WaitForPrevious();
  LetNextBegin();
  const int64_t step = static_cast<int64_t>(gridDim.x) * kSumThreads;
  for (int64_t v = blockIdx.x * kSumThreads + threadIdx.x; v < args.count / 8; v += step) {
    Eight sum = {};
    for (int i = 0; i < args.num_parts; ++i)
      AddBf16(sum, 1.0f, reinterpret_cast<const uint4*>(args.parts[i])[v]);
    reinterpret_cast<uint4*>(args.out)[v] = PackBf16(sum);
  }
}

}  // namespace

cudaError_t RouteSlots(const RouteSlotsArgs& args, cudaStream_t stream) {
  const MoeRouting& routing = args.routing;
  if (!Valid(args.slots, args.num_experts_per_tok) || args.own_rank < 0 ||
      args.own_rank >= args.slots.num_ranks || args.num_real_tokens == nullptr ||
      args.first_expert < 0 || args.num_local_experts < 0 || args.num_local_experts > kMaxExperts ||
      args.num_shared < 0 || args.num_shared > kMaxSharedExperts || args.max_rows < 0 ||
      routing.num_choices != args.num_experts_per_tok + args.num_shared ||
      routing.row_of == nullptr || routing.token_of_row == nullptr ||
      routing.group_offsets == nullptr) {
    return cudaErrorInvalidValue;
  }
  // One block at least: it writes the groups' offsets.
  const int tokens = std::max(args.slots.num_ranks * args.slots.rows, 1);
  return Launch(
      RouteSlotsKernel,
      {.grid = dim3((tokens + kBlockTokens - 1) / kBlockTokens), .block = dim3(kRouteThreads)},
      stream, args);
}

cudaError_t SumExperts(const SumExpertsArgs& args, cudaStream_t stream) {
  if (!Valid(args.slots, args.num_experts_per_tok) || args.hidden_size < 8 ||
      args.hidden_size % 8 != 0 || args.expert_out == nullptr || args.out == nullptr ||
      args.routing.row_of == nullptr || args.routing.num_choices < args.num_experts_per_tok ||
      args.routing.num_choices > 2 * kMaxChoices) {
    return cudaErrorInvalidValue;
  }
  const int tokens = args.slots.num_ranks * args.slots.rows;
  if (tokens == 0) return cudaSuccess;
  return Launch(SumExpertsKernel,
                {.grid = dim3(std::min(tokens, kNumSms * 8)), .block = dim3(kSumThreads)}, stream,
                args);
}

cudaError_t SumParts(const SumPartsArgs& args, cudaStream_t stream) {
  if (args.num_parts < 1 || args.num_parts > kMaxSumParts || args.count < 0 ||
      args.count % 8 != 0 || args.out == nullptr) {
    return cudaErrorInvalidValue;
  }
  for (int i = 0; i < args.num_parts; ++i) {
    if (args.parts[i] == nullptr) return cudaErrorInvalidValue;
  }
  if (args.count == 0) return cudaSuccess;
  const int64_t blocks = (args.count / 8 + kSumThreads - 1) / kSumThreads;
  return Launch(SumPartsKernel,
                {.grid = dim3(static_cast<unsigned>(std::min<int64_t>(blocks, kNumSms * 8))),
                 .block = dim3(kSumThreads)},
                stream, args);
}

}  // namespace latentd
