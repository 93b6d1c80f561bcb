#include "server/bench/roofline.h"

#include <algorithm>
#include <cmath>

#include "engine/model/memory_plan.h"

namespace latentd {
namespace {

// Adds what a product with `weights` costs for `tokens` rows, its weights read once.
void AddProduct(const MemoryPlan::Part& weights, bool fp8, double tokens, RooflinePart* part) {
  part->bytes += static_cast<double>(weights.stored_bytes);
  (fp8 ? part->fp8_flops : part->bf16_flops) +=
      2 * tokens * static_cast<double>(weights.parameters);
}

void Bound(const DeviceRates& rates, RooflinePart* part) {
  part->seconds = std::max(part->bytes / rates.weight_bytes,
                           part->fp8_flops / rates.fp8_flops + part->bf16_flops / rates.bf16_flops);
}

}  // namespace

double Roofline::seconds() const {
  double sum = 0;
  for (const RooflinePart& part : parts) sum += part.seconds;
  return sum;
}

double ExpectedExperts(int num_experts, int per_token, double num_tokens) {
  if (num_experts == 0) return 0;
  const double missed = 1 - static_cast<double>(per_token) / num_experts;
  return num_experts * (1 - std::pow(missed, num_tokens));
}

Roofline StepRoofline(const ModelConfig& model, const StepPlan& plan, const DeviceRates& rates,
                      CacheFormat cache) {
  const MemoryPlan memory = MakeMemoryPlan(model, {.cache_format = cache});
  const bool fp8 = model.quantization.has_value();
  const double layers = model.num_hidden_layers;
  const double moe_layers = std::max(0, model.num_hidden_layers - model.first_k_dense_replace);
  const double heads = model.num_attention_heads;
  const double kv_b = heads * (model.qk_nope_head_dim + model.v_head_dim) * model.kv_lora_rank;
  const double tokens = static_cast<double>(plan.tokens.size());
  double sampled = 0;
  for (const SequenceStep& s : plan.sequences) sampled += s.sample;

  Roofline roofline;
  auto& [projections, attention, dense, experts, head] = roofline.parts;

  projections.name = "attention projections";
  AddProduct(memory.part(WeightPart::kAttention), fp8, tokens, &projections);
  if (fp8) {
    projections.bytes += layers * kv_b;  // bf16, not FP8
  }
  // The arithmetic of kv_b_proj belongs to the form of attention.
  (fp8 ? projections.fp8_flops : projections.bf16_flops) -= 2 * tokens * layers * kv_b;
  Bound(rates, &projections);

  attention.name = "attention";
  for (const SequenceStep& s : plan.sequences) {
    const double keys = s.num_computed_tokens + s.num_tokens;
    const double pairs =
        s.num_tokens * (s.num_computed_tokens + (s.num_tokens + 1) / 2.0);  // causal
    const double absorbed =
        2 * heads * pairs * (model.latent_dim() + model.kv_lora_rank) + 2 * s.num_tokens * kv_b;
    const double direct =
        2 * heads * pairs * (model.qk_head_dim() + model.v_head_dim) + 2 * keys * kv_b;
    attention.bytes += keys * static_cast<double>(memory.cache_bytes_per_token);
    attention.bf16_flops += layers * std::min(absorbed, direct);
  }
  attention.seconds =
      std::max(attention.bytes / rates.cache_bytes, attention.bf16_flops / rates.attention_flops);

  dense.name = "dense and shared";
  AddProduct(memory.part(WeightPart::kDenseMlp), fp8, tokens, &dense);
  AddProduct(memory.part(WeightPart::kSharedExperts), fp8, tokens, &dense);
  Bound(rates, &dense);

  experts.name = "experts";
  if (moe_layers > 0) {
    const MemoryPlan::Part& all = memory.part(WeightPart::kRoutedExperts);
    const int n = model.n_routed_experts, k = model.num_experts_per_tok;
    experts.bytes = static_cast<double>(all.stored_bytes) * ExpectedExperts(n, k, tokens) / n;
    (fp8 ? experts.fp8_flops : experts.bf16_flops) =
        2 * tokens * k * static_cast<double>(all.parameters) / n;
    Bound(rates, &experts);
  }

  head.name = "router and head";
  AddProduct(memory.part(WeightPart::kRouter), /*fp8=*/false, tokens, &head);
  if (sampled > 0) {
    // A tied head is the embedding's matrix.
    AddProduct(memory.part(model.tie_word_embeddings ? WeightPart::kEmbedding : WeightPart::kHead),
               /*fp8=*/false, sampled, &head);
  }
  Bound(rates, &head);
  return roofline;
}

}  // namespace latentd
