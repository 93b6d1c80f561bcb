// Which experts each token takes, and which row of the sorted rows each choice is, after
// router_logits.cu.
//
// A warp chooses for a token (ChooseExperts). Who chose an expert is a bit mask over tokens: rows
// follow from counting bits, in the order of tokens by construction. Up to 256 tokens, the blocks
// of one cluster exchange their masks and finish the rows; more go through global memory to
// NumberRows. Bound by latency.

#include "engine/cuda/kernels/cluster.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/router_logits.h"

namespace latentd {
namespace {

constexpr int kMaxExperts = 384, kMaxGroups = 32, kMaxChoices = 32, kMaxShared = 32;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxClusterTokens = 256;
constexpr int kMaxCluster = 8;
constexpr int kMaskTokens = 32;  // tokens of a block of ChooseExperts and of a mask, at most

// Larger for the larger value; never 0.
__device__ __forceinline__ uint32_t OrderedKey(float value) {
  const uint32_t bits = __float_as_uint(value);
  return max(bits ^ (bits >> 31 != 0 ? ~0u : 0x80000000u), 1u);
}

struct ChooseArgs {
  RouterArgs router;
  const float* logits;  // [num_slices, num_tokens, n_routed_experts], to be added
  int num_slices;
  int block_tokens;  // tokens of a block
  uint32_t*
      masks;  // [blocks, num_local_experts] in global memory; nullptr: one cluster has all tokens
};

// Row numbers of a block's tokens, from the masks of all blocks.
//   masks    [num_blocks, stride]: bit i of masks[b][e]: token i of block b chose local expert e
//   choices  [tokens, kMaxChoices] of this block: local expert, -1: none of them
// All threads of the block call it.
__device__ __forceinline__ void NumberRowsOfBlock(const ChooseArgs& args, const uint32_t* masks,
                                                  int stride, int num_blocks, int block,
                                                  int num_real,
                                                  const int16_t (*choices)[kMaxChoices],
                                                  uint32_t* totals, uint32_t* firsts) {
  const RouterArgs& router = args.router;
  const int num_local = router.num_local_experts;
  // totals[e]: rows of expert e; firsts[e]: those of blocks before this one
  for (int e = threadIdx.x; e < num_local; e += kThreads) {
    uint32_t total = 0, before = 0;
#pragma unroll 8
    for (int b = 0; b < num_blocks; ++b) {
      const uint32_t count = __popc(masks[static_cast<int64_t>(b) * stride + e]);
      total += count;
      if (b < block) before += count;
    }
    totals[e] = total;
    firsts[e] = before;
  }
  __syncthreads();
  if (threadIdx.x < 32) {
    const int lane = threadIdx.x;
    uint32_t rows = 0;
    for (int base = 0; base < num_local; base += 32) {
      const int e = base + lane;
      const uint32_t count = e < num_local ? totals[e] : 0;
      uint32_t through = count;
#pragma unroll
      for (int d = 1; d < 32; d *= 2) {
        const uint32_t below = __shfl_up_sync(~0u, through, d);
        if (lane >= d) through += below;
      }
      if (e < num_local) {
        const uint32_t offset = rows + through - count;
        firsts[e] += offset;
        if (block == 0) router.routing.group_offsets[e] = static_cast<int32_t>(offset);
      }
      rows += __shfl_sync(~0u, through, 31);
    }
    if (lane == 0) totals[num_local] = rows;
  }
  __syncthreads();
  const int routed_rows = static_cast<int>(totals[num_local]);
  if (block == 0 && threadIdx.x <= router.num_shared) {
    router.routing.group_offsets[num_local + threadIdx.x] =
        routed_rows + static_cast<int>(threadIdx.x) * num_real;
  }

  const uint32_t* mask = masks + static_cast<int64_t>(block) * stride;
  const int num_choices = router.routing.num_choices, k = router.num_experts_per_tok;
  const int first_token = block * args.block_tokens;
  const int tokens = min(args.block_tokens, router.num_tokens - first_token);
  for (int at = threadIdx.x; at < tokens * num_choices; at += kThreads) {
    const int local = at / num_choices, j = at % num_choices, token = first_token + local;
    const int64_t to = static_cast<int64_t>(token) * num_choices + j;
    int row = -1;
    if (j < k) {
      const int e = choices[local][j];
      if (e >= 0) row = static_cast<int>(firsts[e]) + __popc(mask[e] & ((1u << local) - 1));
    } else {
      const bool real = token < num_real;
      if (real) row = routed_rows + (j - k) * num_real + token;
      router.routing.weights[to] = real ? 1.0f : 0.0f;
    }
    router.routing.row_of[to] = row;
    if (row >= 0) router.routing.token_of_row[row] = token;
  }
}

// Which expert is item i of a lane: runs of up to four side by side, which one load brings.
template <int kItems>
__device__ __forceinline__ int ExpertOf(int item) {
  constexpr int kRun = kItems < 4 ? kItems : 4;
  return item / kRun * (32 * kRun) + static_cast<int>(threadIdx.x % 32) * kRun + item % kRun;
}

// A lane's logits of a token: the sums over slices.
template <int kItems>
__device__ __forceinline__ void SumSlices(const ChooseArgs& args, int token,
                                          float (&logits)[kItems]) {
  constexpr int kAhead = kItems >= 32 ? 1 : 32 / kItems;  // slices under way: 32 registers
  const int num_experts = args.router.n_routed_experts;
  const float* from = args.logits + static_cast<int64_t>(token) * num_experts;
  const int64_t slice_stride = static_cast<int64_t>(args.router.num_tokens) * num_experts;
#pragma unroll
  for (int i = 0; i < kItems; ++i) logits[i] = 0;
  for (int first = 0; first < args.num_slices; first += kAhead) {
    float slices[kAhead][kItems];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= args.num_slices) break;
      const float* slice = from + (first + s) * slice_stride;
      if (kItems % 4 == 0 && num_experts % 4 == 0) {
#pragma unroll
        for (int i = 0; i < kItems; i += 4) {
          const int expert = ExpertOf<kItems>(i);
          if (expert < num_experts) {
            *reinterpret_cast<float4*>(&slices[s][i]) =
                *reinterpret_cast<const float4*>(slice + expert);
          }
        }
      } else {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int expert = ExpertOf<kItems>(i);
          if (expert < num_experts) slices[s][i] = slice[expert];
        }
      }
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= args.num_slices) break;
#pragma unroll
      for (int i = 0; i < kItems; ++i) logits[i] += slices[s][i];
    }
  }
}

// A token's choice by one warp.
template <int kItems>
__device__ __forceinline__ void ChooseOfToken(const ChooseArgs& args, int token, float* scores,
                                              float* group_scratch, int16_t* choices) {
  const RouterArgs& router = args.router;
  const int lane = threadIdx.x % 32, num_experts = router.n_routed_experts;
  const int k = router.num_experts_per_tok;

  float bias[kItems], logits[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int expert = ExpertOf<kItems>(i);
    bias[i] = expert < num_experts ? router.correction_bias[expert] : 0.0f;
  }
  SumSlices<kItems>(args, token, logits);
  uint32_t keys[kItems];  // 0: not to be chosen
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int expert = ExpertOf<kItems>(i);
    keys[i] = 0;
    if (expert >= num_experts) continue;
    const float score = 1.0f / (1.0f + expf(-logits[i]));
    const float choice = score + bias[i];
    keys[i] = OrderedKey(choice);
    scores[expert] = score;
    group_scratch[expert] = choice;
  }
  __syncwarp();

  if (router.topk_group < router.n_group) {
    // `parts` lanes, a power of two, look through a group together.
    const int per_group = num_experts / router.n_group;
    int parts = 1;
    while (2 * parts * router.n_group <= 32) parts *= 2;
    const int group = lane / parts;
    float best = -INFINITY, second = -INFINITY;
    if (group < router.n_group) {
      for (int i = lane % parts; i < per_group; i += parts) {
        const float choice = group_scratch[group * per_group + i];
        if (choice > best) {
          second = best;
          best = choice;
        } else if (choice > second) {
          second = choice;
        }
      }
    }
    for (int d = 1; d < parts; d *= 2) {
      const float other_best = __shfl_xor_sync(~0u, best, d),
                  other_second = __shfl_xor_sync(~0u, second, d);
      second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
      best = fmaxf(best, other_best);
    }
    uint32_t key = group < router.n_group ? OrderedKey(best + second) : 0;
    uint32_t allowed = 0;
    for (int i = 0; i < router.topk_group; ++i) {
      const uint32_t largest = __reduce_max_sync(~0u, key);
      const int chosen =
          (__ffs(__ballot_sync(~0u, key == largest)) - 1) / parts;  // the lowest of equals
      allowed |= 1u << chosen;
      if (group == chosen) key = 0;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = ExpertOf<kItems>(i);
      if (expert < num_experts && (allowed >> expert / per_group & 1) == 0) keys[i] = 0;
    }
  }

  int chosen = 0;  // lane j: the j-th best
  for (int j = 0; j < k; ++j) {
    uint32_t best = 0;
    int item = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        item = i;
      }
    }
    const uint32_t largest = __reduce_max_sync(~0u, best);
    const uint32_t expert = __reduce_min_sync(~0u, best == largest ? ExpertOf<kItems>(item) : ~0u);
    if (lane == j) chosen = static_cast<int>(expert);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (expert == ExpertOf<kItems>(i)) keys[i] = 0;
    }
  }

  const float score = lane < k ? scores[chosen] : 0.0f;
  float sum = 0.0f;
  for (int j = 0; j < k; ++j) sum += __shfl_sync(~0u, score, j);
  if (lane < k) {
    const float weight =
        (router.norm_topk_prob ? score / (sum + 1e-20f) : score) * router.routed_scaling_factor;
    router.routing.weights[static_cast<int64_t>(token) * router.routing.num_choices + lane] =
        weight;
    router.routing.topk_ids[static_cast<int64_t>(token) * k + lane] = chosen;
    const int local = chosen - router.first_expert;
    choices[lane] =
        static_cast<int16_t>(local >= 0 && local < router.num_local_experts ? local : -1);
  }
  __syncwarp();  // the scratch belongs to the warp's next token
}

template <int kItems>
__global__ void __launch_bounds__(kThreads) ChooseExperts(ChooseArgs args) {
  __shared__ float scores[kWarps][32 * kItems], group_scratch[kWarps][32 * kItems];
  __shared__ int16_t choices[kMaskTokens][kMaxChoices];
  __shared__ uint32_t masks[kMaxCluster][32 * kItems];  // of all blocks of the cluster
  __shared__ uint32_t totals[32 * kItems + 1], firsts[32 * kItems];
  const RouterArgs& router = args.router;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, num_local = router.num_local_experts;
  const bool in_cluster = args.masks == nullptr;
  const int block = blockIdx.x;
  uint32_t* own = masks[in_cluster ? block : 0];
  if (in_cluster) ClusterArrive();
  for (int e = threadIdx.x; e < num_local; e += kThreads) own[e] = 0;
  __syncthreads();
  WaitForPrevious();
  LetNextBegin();

  const int num_real = min(max(*router.num_real_tokens, 0), router.num_tokens);
  for (int local = warp; local < args.block_tokens; local += kWarps) {
    const int token = block * args.block_tokens + local;
    if (token >= router.num_tokens) break;
    if (token < num_real) {
      ChooseOfToken<kItems>(args, token, scores[warp], group_scratch[warp], choices[local]);
      if (lane < router.num_experts_per_tok && choices[local][lane] >= 0) {
        atomicOr(&own[choices[local][lane]], 1u << local);
      }
    } else if (lane < router.num_experts_per_tok) {
      choices[local][lane] = -1;
      router.routing.weights[static_cast<int64_t>(token) * router.routing.num_choices + lane] = 0;
      router.routing.topk_ids[static_cast<int64_t>(token) * router.num_experts_per_tok + lane] = -1;
    }
  }
  __syncthreads();
  if (!in_cluster) {
    for (int e = threadIdx.x; e < num_local; e += kThreads) {
      args.masks[static_cast<int64_t>(block) * num_local + e] = own[e];
    }
    return;
  }
  ClusterWait();  // the others have begun
  const int blocks = gridDim.x;
  for (int other = 0; other < blocks; ++other) {
    if (other == block) continue;
    for (int e = threadIdx.x; e < num_local; e += kThreads) StoreRemote(&own[e], other, own[e]);
  }
  ClusterSync();
  NumberRowsOfBlock(args, masks[0], 32 * kItems, blocks, block, num_real, choices, totals, firsts);
}

__global__ void __launch_bounds__(kThreads) NumberRows(ChooseArgs args) {
  __shared__ int16_t choices[kMaskTokens][kMaxChoices];
  __shared__ uint32_t totals[kMaxExperts + 1], firsts[kMaxExperts];
  WaitForPrevious();
  LetNextBegin();
  const RouterArgs& router = args.router;
  const int num_real = min(max(*router.num_real_tokens, 0), router.num_tokens),
            k = router.num_experts_per_tok;
  const int first_token = blockIdx.x * args.block_tokens;
  for (int at = threadIdx.x; at < args.block_tokens * k; at += kThreads) {
    const int local = at / k, token = first_token + local;
    if (token >= router.num_tokens) break;
    const int expert =
        router.routing.topk_ids[static_cast<int64_t>(token) * k + at % k] - router.first_expert;
    const bool here = token < num_real && expert >= 0 && expert < router.num_local_experts;
    choices[local][at % k] = static_cast<int16_t>(here ? expert : -1);
  }
  NumberRowsOfBlock(args, args.masks, router.num_local_experts, gridDim.x, blockIdx.x, num_real,
                    choices, totals, firsts);
}

cudaError_t LaunchChoose(const ChooseArgs& args, const LaunchShape& shape, cudaStream_t stream) {
  const int experts = args.router.n_routed_experts;
  if (experts <= 32) return Launch(ChooseExperts<1>, shape, stream, args);
  if (experts <= 64) return Launch(ChooseExperts<2>, shape, stream, args);
  if (experts <= 128) return Launch(ChooseExperts<4>, shape, stream, args);
  if (experts <= 256) return Launch(ChooseExperts<8>, shape, stream, args);
  return Launch(ChooseExperts<12>, shape, stream, args);
}

bool Valid(const RouterArgs& args) {
  const MoeRouting& routing = args.routing;
  return args.num_tokens >= 0 && args.n_routed_experts >= 1 &&
         args.n_routed_experts <= kMaxExperts && args.n_group >= 1 && args.n_group <= kMaxGroups &&
         args.n_routed_experts % args.n_group == 0 && args.topk_group >= 1 &&
         args.topk_group <= args.n_group && args.num_experts_per_tok >= 1 &&
         args.num_experts_per_tok <= kMaxChoices &&
         args.num_experts_per_tok <= args.topk_group * (args.n_routed_experts / args.n_group) &&
         (args.topk_group == args.n_group || args.n_routed_experts / args.n_group >= 2) &&
         args.first_expert >= 0 && args.num_local_experts >= 0 &&
         args.first_expert + args.num_local_experts <= args.n_routed_experts &&
         args.num_shared >= 0 && args.num_shared <= kMaxShared && args.correction_bias != nullptr &&
         args.num_real_tokens != nullptr && args.workspace != nullptr &&
         routing.num_choices == args.num_experts_per_tok + args.num_shared &&
         routing.row_of != nullptr && routing.weights != nullptr && routing.topk_ids != nullptr &&
         routing.token_of_row != nullptr && routing.group_offsets != nullptr;
}

}  // namespace

size_t RouterWorkspaceBytes(int max_tokens, int n_routed_experts) {
  const size_t masks =
      (size_t(max_tokens) + kMaskTokens - 1) / kMaskTokens * n_routed_experts * sizeof(uint32_t);
  return RouterLogitBytes(max_tokens, n_routed_experts) + masks;
}

cudaError_t RouteTokens(const RouterArgs& args, cudaStream_t stream) {
  if (!Valid(args)) return cudaErrorInvalidValue;
  if (args.num_tokens == 0) {
    return cudaMemsetAsync(args.routing.group_offsets, 0,
                           (args.num_local_experts + args.num_shared + 1) * sizeof(int32_t),
                           stream);
  }
  float* logits = reinterpret_cast<float*>(args.workspace);
  cudaError_t error = RouterLogits({.num_tokens = args.num_tokens,
                                    .hidden_size = args.hidden_size,
                                    .n_routed_experts = args.n_routed_experts,
                                    .x = args.x,
                                    .gate_bf16 = args.gate_bf16,
                                    .gate_f32 = args.gate_f32,
                                    .out = logits},
                                   stream);
  if (error != cudaSuccess) return error;

  ChooseArgs choose = {
      .router = args,
      .logits = logits,
      .num_slices = RouterLogitSlices(args.num_tokens, args.hidden_size, args.n_routed_experts),
      .block_tokens = kMaskTokens,
      .masks = nullptr};
  if (args.num_tokens <= kMaxClusterTokens) {
    int blocks = 1;  // of kWarps tokens, as long as there are that many blocks
    while (blocks < kMaxCluster && blocks * kWarps < args.num_tokens) blocks *= 2;
    choose.block_tokens = (args.num_tokens + blocks - 1) / blocks;
    return LaunchChoose(choose, {.grid = dim3(blocks), .block = dim3(kThreads), .cluster = blocks},
                        stream);
  }
  choose.masks = reinterpret_cast<uint32_t*>(
      args.workspace + RouterLogitBytes(args.num_tokens, args.n_routed_experts));
  const LaunchShape shape = {.grid = dim3((args.num_tokens + kMaskTokens - 1) / kMaskTokens),
                             .block = dim3(kThreads)};
  error = LaunchChoose(choose, shape, stream);
  if (error != cudaSuccess) return error;
  return Launch(NumberRows, shape, stream, choose);
}

}  // namespace latentd
