#ifndef LATENTD_ENGINE_CUDA_KERNELS_ROUTER_LOGITS_H_
#define LATENTD_ENGINE_CUDA_KERNELS_ROUTER_LOGITS_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>

namespace latentd {

// The first half of RouteTokens() of moe.h.
struct RouterLogitsArgs {
  int num_tokens = 0;   // >= 1
  int hidden_size = 0;  // a multiple of 32
  int n_routed_experts = 0;
  const __nv_bfloat16* x = nullptr;  // [num_tokens, hidden_size]
  // One of them: [n_routed_experts, hidden_size].
  const __nv_bfloat16* gate_bf16 = nullptr;
  const float* gate_f32 = nullptr;
  // [RouterLogitSlices(), num_tokens, n_routed_experts] f32: a logit is the sum over slices, from
  // the first on. Then its bits do not depend on num_tokens.
  float* out = nullptr;
};
int RouterLogitSlices(int num_tokens, int hidden_size, int n_routed_experts);
// Of `out` for up to max_tokens, whatever hidden_size is. Never less for more tokens.
size_t RouterLogitBytes(int max_tokens, int n_routed_experts);
cudaError_t RouterLogits(const RouterLogitsArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_ROUTER_LOGITS_H_
