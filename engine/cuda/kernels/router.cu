// Which experts each token takes, and which row of the sorted rows each choice is, after
// router_logits.cu.
//
// A warp chooses for a token (ChooseExperts). Who chose an expert is a bit mask over tokens: rows
// follow from counting bits, in the order of tokens by construction. Up to 64 tokens, the blocks
// of one cluster exchange their masks and finish the rows; more go through global memory to
// NumberRows. Bound by latency.

#include <algorithm>

#include "engine/cuda/kernels/cluster.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/router_logits.h"

namespace latentd {
namespace {

constexpr int kMaxExperts = kMaxRoutedExperts, kMaxGroups = kMaxExpertGroups;
constexpr int kMaxChoices = kMaxExpertsPerTok;
constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr int kMaxClusterTokens = 64;
constexpr int kMaxShortBlocks = 1024;  // tokens for which a block has one a warp
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
  int block_tokens;            // tokens of a block
  int per_group;               // experts of a group
  int group_shift;             // 1 << group_shift lanes look through a group together
  uint32_t per_group_inverse;  // x * it >> 20 is x / per_group, x < kMaxExperts
  // [blocks, num_local_experts] in global memory; nullptr: one cluster has all tokens.
  uint32_t* masks;
};

// Where the rows of a block's tokens begin.
struct Counts {
  uint32_t first[kMaxExperts];  // of a local expert: the first row of this block's tokens
  uint32_t warp_rows[kWarps];
};

// Row numbers of a block's tokens, from the masks of all blocks.
//   masks    [num_blocks, stride]: bit i of masks[b][e]: token i of block b chose local expert e
//   choices  [tokens, kMaxChoices] of this block: local expert, -1: none of them
// All threads of the block call it. This code runs once a launch, so that its size is its cost:
// hardly a loop is unrolled.
__device__ __forceinline__ void NumberRowsOfBlock(const ChooseArgs& args, const uint32_t* masks,
                                                  int stride, int num_blocks, int block,
                                                  int num_real,
                                                  const int16_t (*choices)[kMaxChoices],
                                                  Counts& counts) {
  const RouterArgs& router = args.router;
  const MoeRouting& routing = router.routing;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_local = router.num_local_experts;
  uint32_t rows = 0;  // of the experts so far
#pragma unroll 1
  for (int base = 0; base < num_local; base += kThreads) {
    const int e = base + static_cast<int>(threadIdx.x);
    uint32_t count = 0, before = 0;  // of all blocks; of those before this one
    if (e < num_local) {
#pragma unroll 8
      for (int b = 0; b < num_blocks; ++b) {
        if (b == block) before = count;
        count += __popc(masks[static_cast<int64_t>(b) * stride + e]);
      }
    }
    uint32_t through = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const uint32_t below = __shfl_up_sync(~0u, through, d);
      if (lane >= d) through += below;
    }
    __syncthreads();  // warp_rows of the experts before is read
    if (lane == 31) counts.warp_rows[warp] = through;
    __syncthreads();
    uint32_t offset = rows + through - count;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) offset += counts.warp_rows[w];
      rows += counts.warp_rows[w];
    }
    if (e < num_local) {
      counts.first[e] = offset + before;
      if (block == 0) routing.group_offsets[e] = static_cast<int32_t>(offset);
    }
  }
  __syncthreads();
  const int routed_rows = static_cast<int>(rows), k = router.num_experts_per_tok;
  if (block == 0 && threadIdx.x <= router.num_shared) {
    routing.group_offsets[num_local + threadIdx.x] =
        routed_rows + static_cast<int>(threadIdx.x) * num_real;
  }
  const uint32_t* mask = masks + static_cast<int64_t>(block) * stride;
#pragma unroll 1
  for (int local = warp; local < args.block_tokens; local += kWarps) {
    const int token = block * args.block_tokens + local;
    if (token >= router.num_tokens) break;
#pragma unroll 1
    for (int j = lane; j < routing.num_choices; j += 32) {
      const int64_t to = static_cast<int64_t>(token) * routing.num_choices + j;
      int row = -1;
      if (j >= k) {
        if (token < num_real) row = routed_rows + (j - k) * num_real + token;
        routing.weights[to] = token < num_real ? 1.0f : 0.0f;
      } else if (const int e = choices[local][j]; e >= 0) {
        row = static_cast<int>(counts.first[e]) + __popc(mask[e] & ((1u << local) - 1));
      }
      routing.row_of[to] = row;
      if (row >= 0) routing.token_of_row[row] = token;
    }
  }
}

// Which expert is item i of a lane: runs of kRun side by side, which one load brings.
template <int kRun>
__device__ __forceinline__ int ExpertOf(int item) {
  const int lane = threadIdx.x % 32;
  return item / kRun * (32 * kRun) + lane * kRun + item % kRun;
}

// A lane's logits of a token: the sums over slices.
template <int kItems, int kRun>
__device__ __forceinline__ void SumSlices(const ChooseArgs& args, int token,
                                          float (&logits)[kItems]) {
  constexpr int kAhead = kItems >= 12 ? 5 : kItems >= 8 ? 8 : 16;  // slices under way
  const int num_experts = args.router.n_routed_experts;
  const float* slice = args.logits + static_cast<int64_t>(token) * num_experts;
  const int64_t slice_stride = static_cast<int64_t>(args.router.num_tokens) * num_experts;
#pragma unroll
  for (int i = 0; i < kItems; ++i) logits[i] = 0;
#pragma unroll 1
  for (int first = 0; first < args.num_slices; first += kAhead) {
    float slices[kAhead][kItems];
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= args.num_slices) break;
#pragma unroll
      for (int i = 0; i < kItems; i += kRun) {
        const int expert = ExpertOf<kRun>(i);
        if (expert >= num_experts) continue;
        if constexpr (kRun == 4) {
          *reinterpret_cast<float4*>(&slices[s][i]) =
              *reinterpret_cast<const float4*>(slice + expert);
        } else {
          slices[s][i] = slice[expert];
        }
      }
      slice += slice_stride;
    }
#pragma unroll
    for (int s = 0; s < kAhead; ++s) {
      if (first + s >= args.num_slices) break;
#pragma unroll
      for (int i = 0; i < kItems; ++i) logits[i] += slices[s][i];
    }
  }
}

// A token's choice by one warp, from its logits and the bias. Its size is its cost, as above.
template <int kItems, int kRun>
__device__ __forceinline__ void ChooseOfToken(const ChooseArgs& args, int token,
                                              const float (&logits)[kItems],
                                              const float (&bias)[kItems], float* scores,
                                              float* group_scratch, int16_t* choices) {
  const RouterArgs& router = args.router;
  const int lane = threadIdx.x % 32, num_experts = router.n_routed_experts;
  const int k = router.num_experts_per_tok;

  uint32_t keys[kItems];  // 0: not to be chosen
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int expert = ExpertOf<kRun>(i);
    keys[i] = 0;
    if (expert >= num_experts) continue;
    const float score = __fdividef(1.0f, 1.0f + expf(-logits[i]));
    const float choice = score + bias[i];
    keys[i] = OrderedKey(choice);
    scores[expert] = score;
    group_scratch[expert] = choice;
  }
  __syncwarp();

  if (router.topk_group < router.n_group) {
    const int per_group = args.per_group, parts = 1 << args.group_shift;
    const int group = lane >> args.group_shift;
    float best = -INFINITY, second = -INFINITY;
    if (group < router.n_group) {
#pragma unroll 2
      for (int i = lane & (parts - 1); i < per_group; i += parts) {
        const float choice = group_scratch[group * per_group + i];
        if (choice > best) {
          second = best;
          best = choice;
        } else if (choice > second) {
          second = choice;
        }
      }
    }
#pragma unroll 1
    for (int d = 1; d < parts; d *= 2) {
      const float other_best = __shfl_xor_sync(~0u, best, d);
      const float other_second = __shfl_xor_sync(~0u, second, d);
      second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
      best = fmaxf(best, other_best);
    }
    uint32_t key = group < router.n_group ? OrderedKey(best + second) : 0;
    uint32_t allowed = 0;
#pragma unroll 1
    for (int i = 0; i < router.topk_group; ++i) {
      const uint32_t largest = __reduce_max_sync(~0u, key);
      // The lowest of equals.
      const int chosen = (__ffs(__ballot_sync(~0u, key == largest)) - 1) >> args.group_shift;
      allowed |= 1u << chosen;
      if (group == chosen) key = 0;
    }
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int expert = ExpertOf<kRun>(i);
      const int group_of =
          static_cast<int>(static_cast<uint32_t>(expert) * args.per_group_inverse >> 20);
      if (expert < num_experts && (allowed >> group_of & 1) == 0) keys[i] = 0;
    }
  }

  int chosen = 0;  // lane j: the j-th best
#pragma unroll 1
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
    const uint32_t expert = __reduce_min_sync(~0u, best == largest ? ExpertOf<kRun>(item) : ~0u);
    if (lane == j) chosen = static_cast<int>(expert);
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (expert == ExpertOf<kRun>(i)) keys[i] = 0;
    }
  }

  const float score = lane < k ? scores[chosen] : 0.0f;
  float sum = 0.0f;
#pragma unroll 1
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

template <int kItems, int kRun>
__global__ void __launch_bounds__(kThreads) ChooseExperts(ChooseArgs args) {
  __shared__ float scores[kWarps][32 * kItems], group_scratch[kWarps][32 * kItems];
  __shared__ int16_t choices[kMaskTokens][kMaxChoices];
  __shared__ uint32_t masks[kMaxCluster][32 * kItems];  // of all blocks of the cluster
  __shared__ Counts counts;
  const RouterArgs& router = args.router;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_local = router.num_local_experts, k = router.num_experts_per_tok;
  const bool in_cluster = args.masks == nullptr;
  const int block = blockIdx.x;
  uint32_t* own = masks[in_cluster ? block : 0];
  if (in_cluster) ClusterArrive();
#pragma unroll 1
  for (int e = threadIdx.x; e < num_local; e += kThreads) own[e] = 0;
  float bias[kItems];
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const int expert = ExpertOf<kRun>(i);
    bias[i] = expert < router.n_routed_experts ? router.correction_bias[expert] : 0.0f;
  }
  __syncthreads();
  WaitForPrevious();
  LetNextBegin();

  const int num_real = min(max(*router.num_real_tokens, 0), router.num_tokens);
#pragma unroll 1
  for (int local = warp; local < args.block_tokens; local += kWarps) {
    const int token = block * args.block_tokens + local;
    if (token >= router.num_tokens) break;
    float logits[kItems];
    SumSlices<kItems, kRun>(args, token,
                            logits);  // padding's too: the loads do not wait for num_real
    if (token < num_real) {
      ChooseOfToken<kItems, kRun>(args, token, logits, bias, scores[warp], group_scratch[warp],
                                  choices[local]);
      if (lane < k && choices[local][lane] >= 0) atomicOr(&own[choices[local][lane]], 1u << local);
    } else if (lane < k) {
      choices[local][lane] = -1;
      router.routing.weights[static_cast<int64_t>(token) * router.routing.num_choices + lane] = 0;
      router.routing.topk_ids[static_cast<int64_t>(token) * k + lane] = -1;
    }
  }
  __syncthreads();
  if (!in_cluster) {
#pragma unroll 1
    for (int e = threadIdx.x; e < num_local; e += kThreads) {
      args.masks[static_cast<int64_t>(block) * num_local + e] = own[e];
    }
    return;
  }
  const int blocks = gridDim.x;
  ClusterWait();  // the others have begun
  if (blocks > 1) {
#pragma unroll 1
    for (int e = threadIdx.x; e < num_local; e += kThreads) {
#pragma unroll 1
      for (int other = 0; other < blocks; ++other) {
        if (other != block) StoreRemote(&own[e], other, own[e]);
      }
    }
    ClusterSync();
  }
  NumberRowsOfBlock(args, masks[0], 32 * kItems, blocks, block, num_real, choices, counts);
}

__global__ void __launch_bounds__(kThreads) NumberRows(ChooseArgs args) {
  __shared__ int16_t choices[kMaskTokens][kMaxChoices];
  __shared__ Counts counts;
  WaitForPrevious();
  LetNextBegin();
  const RouterArgs& router = args.router;
  const int num_real = min(max(*router.num_real_tokens, 0), router.num_tokens);
  const int k = router.num_experts_per_tok, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
  for (int local = warp; local < args.block_tokens; local += kWarps) {
    const int token = blockIdx.x * args.block_tokens + local;
    if (token >= router.num_tokens) break;
    if (lane >= k) continue;
    const int expert =
        router.routing.topk_ids[static_cast<int64_t>(token) * k + lane] - router.first_expert;
    const bool here = token < num_real && expert >= 0 && expert < router.num_local_experts;
    choices[local][lane] = static_cast<int16_t>(here ? expert : -1);
  }
  NumberRowsOfBlock(args, args.masks, router.num_local_experts, gridDim.x, blockIdx.x, num_real,
                    choices, counts);
}

// --- Launchers

cudaError_t LaunchChoose(const ChooseArgs& args, const LaunchShape& shape, cudaStream_t stream) {
  const int experts = args.router.n_routed_experts;
  if (experts <= 32) return Launch(ChooseExperts<1, 1>, shape, stream, args);
  if (experts % 4 != 0) return Launch(ChooseExperts<12, 1>, shape, stream, args);
  if (experts <= 128) return Launch(ChooseExperts<4, 4>, shape, stream, args);
  if (experts <= 256) return Launch(ChooseExperts<8, 4>, shape, stream, args);
  return Launch(ChooseExperts<12, 4>, shape, stream, args);
}

// Tokens of a block that is in no cluster, and how many such blocks there are.
int MaskTokens(int num_tokens) { return num_tokens <= kMaxShortBlocks ? kWarps : kMaskTokens; }
int MaskBlocks(int num_tokens) {
  return (num_tokens + MaskTokens(num_tokens) - 1) / MaskTokens(num_tokens);
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
         args.num_shared >= 0 && args.num_shared <= kMaxSharedExperts &&
         args.correction_bias != nullptr && args.num_real_tokens != nullptr &&
         args.workspace != nullptr &&
         routing.num_choices == args.num_experts_per_tok + args.num_shared &&
         routing.row_of != nullptr && routing.weights != nullptr && routing.topk_ids != nullptr &&
         routing.token_of_row != nullptr && routing.group_offsets != nullptr;
}

}  // namespace

size_t RouterWorkspaceBytes(int max_tokens, int n_routed_experts) {
  const int masks =
      std::max(MaskBlocks(std::min(max_tokens, kMaxShortBlocks)), MaskBlocks(max_tokens));
  return RouterLogitBytes(max_tokens, n_routed_experts) +
         size_t(masks) * n_routed_experts * sizeof(uint32_t);
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

  const uint32_t per_group = args.n_routed_experts / args.n_group;
  int group_shift = 0;
  while ((2 << group_shift) * args.n_group <= 32) ++group_shift;
  ChooseArgs choose = {
      .router = args,
      .logits = logits,
      .num_slices = RouterLogitSlices(args.num_tokens, args.hidden_size, args.n_routed_experts),
      .block_tokens = MaskTokens(args.num_tokens),
      .per_group = static_cast<int>(per_group),
      .group_shift = group_shift,
      .per_group_inverse = ((1u << 20) + per_group - 1) / per_group,
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
  const LaunchShape shape = {.grid = dim3(MaskBlocks(args.num_tokens)), .block = dim3(kThreads)};
  error = LaunchChoose(choose, shape, stream);
  if (error != cudaSuccess) return error;
  return Launch(NumberRows, shape, stream, choose);
}

}  // namespace latentd
