#ifndef LATENTD_ENGINE_CUDA_KERNELS_MOE_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MOE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "engine/cuda/kernels/tensors.h"

namespace latentd {

// Which rows each expert computes. A token has `num_choices` = num_experts_per_tok + num_shared
// choices: its routed experts, then the shared ones, which are the last groups and take every token
// with weight 1. Rows are sorted by group, within a group by token: the same whatever the order in
// which threads ran. All on the device.
struct MoeRouting {
  int num_choices = 0;
  int32_t* row_of = nullptr;    // [num_tokens, num_choices] row of the sorted rows; -1: none
                                // (padding, not a local expert)
  float* weights = nullptr;     // [num_tokens, num_choices] f32
  int32_t* topk_ids = nullptr;  // [num_tokens, num_experts_per_tok] global expert ids, best first
  int32_t* token_of_row = nullptr;   // [num_tokens * num_choices]
  int32_t* group_offsets = nullptr;  // [num_groups + 1]; the last is the number of rows
};

// What RouteTokens is compiled for.
inline constexpr int kMaxRoutedExperts = 384;
inline constexpr int kMaxExpertGroups = 32;  // n_group
inline constexpr int kMaxExpertsPerTok = 32;
inline constexpr int kMaxSharedExperts = 32;

// DeepSeek's router, as Transformers computes it: f32 logits, sigmoid, the correction bias for the
// choice alone, the best topk_group groups by their two best experts (the others -inf), the best
// num_experts_per_tok in them, weights normalised and scaled.
struct RouterArgs {
  int num_tokens = 0;  // rows, padding included
  const int32_t* num_real_tokens =
      nullptr;  // device; rows from there on are padding and get no expert
  int hidden_size = 0;
  const __nv_bfloat16* x = nullptr;  // [num_tokens, hidden_size]
  // One of them: [n_routed_experts, hidden_size].
  const __nv_bfloat16* gate_bf16 = nullptr;
  const float* gate_f32 = nullptr;
  const float* correction_bias = nullptr;  // [n_routed_experts]
  int n_routed_experts = 0, n_group = 1, topk_group = 1, num_experts_per_tok = 0;
  bool norm_topk_prob = true;
  float routed_scaling_factor = 1;
  int first_expert = 0,
      num_local_experts = 0;       // the experts of this rank; the others' choices have row -1
  int num_shared = 0;              // shared experts of width moe_intermediate_size
  std::byte* workspace = nullptr;  // RouterWorkspaceBytes(); zeroed once before the first use
  MoeRouting routing;              // written
};
size_t RouterWorkspaceBytes(int max_tokens, int n_routed_experts);
cudaError_t RouteTokens(const RouterArgs& args, cudaStream_t stream);

// out[r] = x[token_of_row[r]] for each of the routing's rows. FP8 (with scales) or bf16, whichever
// x has. With num_ranks > 0 token t is token t % rank_rows of the slot of rank t / rank_rows, and x
// is that of rank 0's slot (exchange.h).
struct GatherArgs {
  MoeRouting routing;
  int num_groups = 0;
  int max_rows = 0;
  int hidden_size = 0;
  LinearInput x;    // [num_tokens, hidden_size]
  LinearInput out;  // [max_rows, hidden_size]
  int num_ranks = 0, rank_rows = 0;
  int64_t slot_bytes = 0;  // from a rank's x to the next rank's, a multiple of 16
};
cudaError_t GatherRows(const GatherArgs& args, cudaStream_t stream);

// Grouped products of bf16 weights, for checkpoints without quantisation: what fp8_gemm.h is for
// the others, and with its meaning of group_offsets and swiglu (rows interleaved by eights). k % 32
// == 0, n % 16 == 0.
struct Bf16GemmArgs {
  const __nv_bfloat16* x = nullptr;  // [num_rows, k]
  int num_rows = 0;
  WeightMatrix weight;  // bf16
  const int32_t* group_offsets = nullptr;
  __nv_bfloat16* out = nullptr;  // [num_rows, n or n / 2]
  int64_t out_stride = 0;
  bool swiglu = false;
};
cudaError_t GroupedBf16Gemm(const Bf16GemmArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MOE_H_
