#ifndef LATENTD_ENGINE_CUDA_KERNELS_EXCHANGE_H_
#define LATENTD_ENGINE_CUDA_KERNELS_EXCHANGE_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/tensors.h"

namespace latentd {

// The experts' side of an expert-parallel group: every rank has sent its tokens, with the experts
// that they chose, and each computes those of its own. What comes from other ranks is not trusted:
// whatever the bytes are, nothing is read or written outside of the arrays.

// What the ranks have sent, one slot each: all arrays have the same place in each slot. Token t of
// the group is token t % rows of rank t / rows.
struct RankSlots {
  int num_ranks = 0;
  int rows = 0;            // tokens of a rank, padding included
  int64_t slot_bytes = 0;  // from a rank's arrays to the next rank's; a multiple of 16
  // Rank 0's: [rows, num_experts_per_tok], aligned to 16; -1: padding.
  const int32_t* topk_ids = nullptr;
  const float* weights = nullptr;  // likewise
};

// The rows that a rank's experts compute, from what all ranks have sent: `routing` as RouteTokens()
// would make it of all the tokens, but that the shared experts take this rank's own alone, and that
// its weights and topk_ids are those of the slots. Rows beyond max_rows, which only wrong ids ask
// for, are left out.
struct RouteSlotsArgs {
  RankSlots slots;
  int own_rank = 0;
  const int32_t* num_real_tokens = nullptr;  // device; this rank's own, the rest are padding
  int num_experts_per_tok = 0;
  int first_expert = 0, num_local_experts = 0;
  int num_shared = 0;
  int max_rows = 0;
  MoeRouting routing;  // row_of [num_ranks * rows, num_choices], token_of_row, group_offsets
};
cudaError_t RouteSlots(const RouteSlotsArgs& args, cudaStream_t stream);

// What a rank's experts give to each token: out[t] = sum over the choices j of weight[t, j] *
// expert_out[row_of[t, j]], summed in f32 in the order of j; zero where this rank has none of its
// experts.
struct SumExpertsArgs {
  RankSlots slots;
  int num_experts_per_tok = 0;
  int hidden_size = 0;                        // a multiple of 8
  const __nv_bfloat16* expert_out = nullptr;  // [expert rows, hidden_size]
  MoeRouting routing;                         // row_of; the weight of a shared expert is 1
  __nv_bfloat16* out = nullptr;               // [num_ranks * rows, hidden_size]
};
cudaError_t SumExperts(const SumExpertsArgs& args, cudaStream_t stream);

// out [count] = the sum of parts[0] .. parts[num_parts - 1], in f32 in this order. All on one
// device.
inline constexpr int kMaxSumParts = 64;
struct SumPartsArgs {
  const __nv_bfloat16* parts[kMaxSumParts] = {};
  int num_parts = 0;
  int64_t count = 0;  // a multiple of 8
  __nv_bfloat16* out = nullptr;
};
cudaError_t SumParts(const SumPartsArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_EXCHANGE_H_
