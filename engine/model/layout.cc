#include "engine/model/layout.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace latentd {
namespace {

// Walks the tensors of one model. The part of MTP layers is kMtp throughout.
class Walk {
 public:
  Walk(const ModelConfig& config, WeightVisitor& visitor, bool mtp)
      : config_(config), visitor_(visitor), mtp_(mtp) {}

  void Tensor(std::string name, std::vector<int64_t> shape, WeightKind kind, WeightPart part,
              TensorView& view) {
    visitor_.Tensor(
        {std::move(name), std::move(shape), kind, mtp_ ? WeightPart::kMtp : part, expert_}, view);
  }

  void Norm(std::string name, int64_t width, TensorView& view) {
    Tensor(std::move(name), {width}, WeightKind::kNorm, WeightPart::kNorms, view);
  }

  // `name` without ".weight".
  void Linear(const std::string& name, int64_t out, int64_t in, WeightPart part,
              LinearWeight& linear, bool bias = false) {
    const WeightPart actual = mtp_ ? WeightPart::kMtp : part;
    visitor_.Linear({name + ".weight", {out, in}, WeightKind::kLinear, actual, expert_}, linear);
    if (bias) {
      Tensor(name + ".bias", {out}, WeightKind::kBias, actual, linear.bias);
    }
  }

  void Mlp(const std::string& prefix, int64_t width, WeightPart part, MlpWeights& mlp) {
    const int64_t hidden = config_.hidden_size;
    Linear(prefix + "gate_proj", width, hidden, part, mlp.gate_proj);
    Linear(prefix + "up_proj", width, hidden, part, mlp.up_proj);
    Linear(prefix + "down_proj", hidden, width, part, mlp.down_proj);
  }

  void Layer(int32_t layer, LayerWeights& weights) {
    const std::string prefix = absl::StrCat("model.layers.", layer, ".");
    Norm(prefix + "input_layernorm.weight", config_.hidden_size, weights.input_layernorm);
    Attention(prefix + "self_attn.", weights);
    Norm(prefix + "post_attention_layernorm.weight", config_.hidden_size,
         weights.post_attention_layernorm);
    if (config_.is_moe_layer(layer)) {
      Moe(prefix + "mlp.", weights.moe);
    } else {
      Mlp(prefix + "mlp.", config_.intermediate_size, WeightPart::kDenseMlp, weights.mlp);
    }
  }

 private:
  void Attention(const std::string& prefix, LayerWeights& weights) {
    constexpr WeightPart kPart = WeightPart::kAttention;
    const int64_t heads = config_.num_attention_heads;
    const int64_t hidden = config_.hidden_size;
    const int64_t q_dim = heads * config_.qk_head_dim();
    if (config_.q_lora_rank) {
      Linear(prefix + "q_a_proj", *config_.q_lora_rank, hidden, kPart, weights.q_a_proj,
             config_.attention_bias);
      Norm(prefix + "q_a_layernorm.weight", *config_.q_lora_rank, weights.q_a_layernorm);
      Linear(prefix + "q_b_proj", q_dim, *config_.q_lora_rank, kPart, weights.q_b_proj);
    } else {
      Linear(prefix + "q_proj", q_dim, hidden, kPart, weights.q_proj);
    }
    Linear(prefix + "kv_a_proj_with_mqa", config_.latent_dim(), hidden, kPart,
           weights.kv_a_proj_with_mqa, config_.attention_bias);
    Norm(prefix + "kv_a_layernorm.weight", config_.kv_lora_rank, weights.kv_a_layernorm);
    Linear(prefix + "kv_b_proj", heads * (config_.qk_nope_head_dim + config_.v_head_dim),
           config_.kv_lora_rank, kPart, weights.kv_b_proj);
    Linear(prefix + "o_proj", hidden, heads * config_.v_head_dim, kPart, weights.o_proj,
           config_.attention_bias);
  }

  void Moe(const std::string& prefix, MoeWeights& moe) {
    Tensor(prefix + "gate.weight", {config_.n_routed_experts, config_.hidden_size},
           WeightKind::kUnquantized, WeightPart::kRouter, moe.gate);
    Tensor(prefix + "gate.e_score_correction_bias", {config_.n_routed_experts},
           WeightKind::kCorrectionBias, WeightPart::kRouter, moe.e_score_correction_bias);
    moe.experts.resize(config_.n_routed_experts);
    for (expert_ = 0; expert_ < config_.n_routed_experts; ++expert_) {
      Mlp(absl::StrCat(prefix, "experts.", expert_, "."), config_.moe_intermediate_size,
          WeightPart::kRoutedExperts, moe.experts[expert_]);
    }
    expert_ = kNoExpert;
    if (config_.n_shared_experts > 0) {
      Mlp(prefix + "shared_experts.",
          int64_t{config_.n_shared_experts} * config_.moe_intermediate_size,
          WeightPart::kSharedExperts, moe.shared_experts);
    }
  }

  const ModelConfig& config_;
  WeightVisitor& visitor_;
  const bool mtp_;
  int32_t expert_ = kNoExpert;  // whose tensors are walked
};

}  // namespace

std::string_view WeightPartName(WeightPart part) {
  constexpr std::string_view kNames[kNumWeightParts] = {
      "embedding", "attention", "dense MLP", "routed experts", "shared experts", "router",
      "norms",     "head",      "MTP"};
  return kNames[static_cast<int>(part)];
}

void VisitWeights(const ModelConfig& config, ModelWeights& weights, WeightVisitor& visitor) {
  Walk walk(config, visitor, /*mtp=*/false);
  const std::vector<int64_t> vocabulary = {config.vocab_size, config.hidden_size};
  walk.Tensor("model.embed_tokens.weight", vocabulary, WeightKind::kEmbedding,
              WeightPart::kEmbedding, weights.embed_tokens);
  weights.layers.resize(config.num_hidden_layers);
  for (int32_t i = 0; i < config.num_hidden_layers; ++i) walk.Layer(i, weights.layers[i]);
  walk.Norm("model.norm.weight", config.hidden_size, weights.norm);
  if (!config.tie_word_embeddings) {
    walk.Tensor("lm_head.weight", vocabulary, WeightKind::kEmbedding, WeightPart::kHead,
                weights.lm_head);
  }
}

void VisitMtpLayer(const ModelConfig& config, int32_t index, WeightVisitor& visitor) {
  Walk walk(config, visitor, /*mtp=*/true);
  const int32_t layer = config.num_hidden_layers + index;
  const std::string prefix = absl::StrCat("model.layers.", layer, ".");
  const std::vector<int64_t> vocabulary = {config.vocab_size, config.hidden_size};
  LayerWeights weights;
  TensorView embed_tokens, enorm, hnorm, eh_proj, norm, head;
  walk.Tensor(prefix + "embed_tokens.weight", vocabulary, WeightKind::kEmbedding, WeightPart::kMtp,
              embed_tokens);
  walk.Norm(prefix + "enorm.weight", config.hidden_size, enorm);
  walk.Norm(prefix + "hnorm.weight", config.hidden_size, hnorm);
  walk.Tensor(prefix + "eh_proj.weight", {config.hidden_size, 2 * int64_t{config.hidden_size}},
              WeightKind::kUnquantized, WeightPart::kMtp, eh_proj);
  walk.Layer(layer, weights);
  walk.Norm(prefix + "shared_head.norm.weight", config.hidden_size, norm);
  walk.Tensor(prefix + "shared_head.head.weight", vocabulary, WeightKind::kEmbedding,
              WeightPart::kMtp, head);
}

std::vector<int64_t> ScaleShape(const Fp8Quantization& fp8, const std::vector<int64_t>& shape) {
  return {(shape[0] + fp8.block_rows - 1) / fp8.block_rows,
          (shape[1] + fp8.block_cols - 1) / fp8.block_cols};
}

}  // namespace latentd
