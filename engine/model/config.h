#ifndef LATENTD_ENGINE_MODEL_CONFIG_H_
#define LATENTD_ENGINE_MODEL_CONFIG_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace latentd {

// YaRN: https://arxiv.org/abs/2309.00071, with the names of config.json's `rope_scaling`.
struct YarnScaling {
  float factor = 1.0f;  // >= 1; positions reach factor * original_max_position_embeddings
  int32_t original_max_position_embeddings = 4096;
  float beta_fast = 32.0f;
  float beta_slow = 1.0f;
  float mscale = 0.0f;                    // 0: absent
  float mscale_all_dim = 0.0f;            // 0: absent
  std::optional<float> attention_factor;  // given: replaces the value computed from the mscales
  bool truncate = true;                   // round the correction range to whole dims

  // What cos and sin are multiplied by.
  float cos_sin_scale() const;
  // What qk_head_dim^-0.5 is multiplied by.
  float softmax_scale() const;
};

// FP8 e4m3 weights with one fp32 scale (`<name>_scale_inv`) per block of rows x columns.
struct Fp8Quantization {
  int32_t block_rows = 128;
  int32_t block_cols = 128;
  // scale_fmt "ue8m0": an engine that quantises activations rounds their scales up to powers of
  // two.
  bool power_of_two_scales = false;
};

// The epsilon of q_a_layernorm and kv_a_layernorm, which Transformers takes from no field.
inline constexpr float kLatentNormEps = 1e-6f;

// A `deepseek_v3` config.json, every dim under its own name there. Constant after loading.
struct ModelConfig {
  int32_t vocab_size = 0;
  int32_t hidden_size = 0;
  int32_t num_hidden_layers = 0;      // without the MTP layer
  int32_t first_k_dense_replace = 0;  // the first k layers have a dense MLP
  int32_t intermediate_size = 0;      // dense MLP
  int32_t moe_intermediate_size = 0;  // one expert
  int32_t n_routed_experts = 0;
  int32_t n_shared_experts = 0;  // their MLP is n_shared_experts * moe_intermediate_size wide
  int32_t num_experts_per_tok = 0;
  int32_t n_group = 1;
  int32_t topk_group = 1;
  float routed_scaling_factor = 1.0f;
  bool norm_topk_prob = true;
  int32_t num_attention_heads = 0;
  std::optional<int32_t> q_lora_rank;  // nullopt: one q_proj instead of q_a_proj and q_b_proj
  int32_t kv_lora_rank = 0;
  int32_t qk_nope_head_dim = 0;
  int32_t qk_rope_head_dim = 0;
  int32_t v_head_dim = 0;
  bool attention_bias = false;  // q_a_proj, kv_a_proj_with_mqa and o_proj have a bias
  bool rope_interleave = true;
  float rope_theta = 10000.0f;
  std::optional<YarnScaling> yarn;  // nullopt: plain RoPE
  float rms_norm_eps = 1e-6f;       // of all norms but q_a_layernorm and kv_a_layernorm
  int32_t max_position_embeddings = 0;
  bool tie_word_embeddings = false;
  int32_t num_nextn_predict_layers = 0;  // MTP layers, stored behind the others
  int32_t dtype_bytes = 2;               // of weights that are not FP8: bfloat16, or 4 for float32
  std::optional<Fp8Quantization> quantization;
  std::optional<int32_t> bos_token_id;
  std::vector<int32_t> eos_token_ids;  // any of them ends an answer; may be empty
  // Fields that mean nothing to this program, in the order of their names: worth a line in the log.
  std::vector<std::string> unknown_fields;

  int32_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int32_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }  // of one cached token
  bool is_moe_layer(int32_t layer) const { return layer >= first_k_dense_replace; }
};

// Reads config.json's text. Each field of Transformers' DeepseekV3Config is honoured or refused:
// INVALID_ARGUMENT names the field, its value and what is supported. An absent field has the
// default that it has there.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json);

// The same from `dir`/config.json.
absl::StatusOr<ModelConfig> LoadModelConfig(const std::filesystem::path& dir);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_CONFIG_H_
