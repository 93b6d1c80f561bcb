#ifndef LATENTD_SERVER_BENCH_ROOFLINE_H_
#define LATENTD_SERVER_BENCH_ROOFLINE_H_

#include <array>
#include <string_view>

#include "engine/model/cache_format.h"
#include "engine/model/config.h"
#include "engine/step.h"

namespace latentd {

// What a GPU does in a second.
struct DeviceRates {
  double weight_bytes = 0;     // read of weights by a matrix product
  double cache_bytes = 0;      // read of the KV cache by attention
  double fp8_flops = 0;        // products with FP8 weights
  double bf16_flops = 0;       // products with others
  double attention_flops = 0;  // scores and values
};

// The H100 SXM's datasheet (HBM3, dense).
inline constexpr DeviceRates kH100Peak = {.weight_bytes = 3.35e12,
                                          .cache_bytes = 3.35e12,
                                          .fp8_flops = 1979e12,
                                          .bf16_flops = 989e12,
                                          .attention_flops = 989e12};
// What the best published kernels reach on it.
inline constexpr DeviceRates kH100Reached = {.weight_bytes = 2.4e12,
                                             .cache_bytes = 3.0e12,
                                             .fp8_flops = 1200e12,
                                             .bf16_flops = 700e12,
                                             .attention_flops = 600e12};

// The least that one step can take: the model's parts one after the other, each bound by the bytes
// that it must read once from memory, or by its arithmetic. T tokens, of S sequences that draw:
//
//   attention projections  all of self_attn, kv_b_proj in bf16 (it is split for absorption)
//   attention              bytes: each sequence's cache (bf16: 2 latent_dim a token and layer).
//   FLOPs: with
//                          P pairs of a query and a key that it sees, and C keys in all, the
//                          smaller of absorbed, 2 heads P (latent_dim + kv_lora_rank) + 2 T kv_b,
//                          and direct, 2 heads P (qk_head_dim + v_head_dim) + 2 C kv_b, a layer
//   dense and shared       the dense layers' MLPs and the shared experts
//   experts                bytes: those of E = n (1 - (1 - k / n)^T) distinct experts a layer, what
//   k
//                          of n drawn evenly for each of T tokens come to. FLOPs: 2 T k of one
//   router and head        router for T tokens, head for S
//
// FLOPs of a product are 2 T times its parameters. Activations, norms and the embedding's rows are
// left out.
struct RooflinePart {
  std::string_view name;
  double bytes = 0;
  double fp8_flops = 0;
  double bf16_flops = 0;
  double seconds = 0;
};
struct Roofline {
  std::array<RooflinePart, 5> parts;

  double seconds() const;
};
Roofline StepRoofline(const ModelConfig& model, const StepPlan& plan, const DeviceRates& rates,
                      CacheFormat cache = CacheFormat::kBf16);

// The distinct experts of `num_experts` that `num_tokens` tokens hit, each choosing `per_token` of
// them evenly: the expected number.
double ExpectedExperts(int num_experts, int per_token, double num_tokens);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_ROOFLINE_H_
