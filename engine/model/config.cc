#include "engine/model/config.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json.h"
#include "engine/model/json_fields.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr size_t kMaxConfigBytes = 1 << 20;

// Far above any model and low enough that no product of two of them leaves int64, and that a
// hostile config cannot make us allocate gigabytes before its checkpoint proves it wrong.
constexpr int64_t kMaxDim = 1 << 20;
constexpr int64_t kMaxVocab = 1 << 24;
constexpr int64_t kMaxPositions = 1 << 24;  // fp32 counts exactly up to here
constexpr int64_t kMaxLayers = 1 << 12;
constexpr int64_t kMaxExpertsOfAllLayers = 1 << 20;
constexpr double kMaxFloat = 1e9;

// Fields that change training, bookkeeping or the shape of Transformers' outputs, never the logits.
constexpr std::string_view kInertFields[] = {
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "attention_dropout",
    "attn_implementation",
    "auto_map",
    "aux_loss_alpha",
    "chunk_size_feed_forward",
    "ep_size",
    "experts_implementation",
    "id2label",
    "initializer_range",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "seq_aux",
    "tie_last_hidden_states",
    "tokenizer_class",
    "transformers_version",
    "use_cache",
};

// Fields of other architectures that change the logits. One value of each means "not used"; any
// other is refused: serving it as if it were not there would give wrong answers, silently.
struct FixedField {
  std::string_view name;
  const char* supported;  // JSON
};
constexpr FixedField kFixedFields[] = {
    {"hidden_act", R"("silu")"},
    {"scoring_func", R"("sigmoid")"},
    {"topk_method", R"("noaux_tc")"},
    {"moe_layer_freq", "1"},
    {"mlp_bias", "false"},
    {"partial_rotary_factor", "1.0"},
    {"is_encoder_decoder", "false"},
    {"add_cross_attention", "false"},
    {"qk_layernorm", "false"},
    {"use_qk_norm", "false"},
    {"use_sliding_window", "false"},
    {"sliding_window", "null"},
    {"attn_logit_softcapping", "null"},
    {"final_logit_softcapping", "null"},
    {"swiglu_limit", "null"},
    {"index_head_dim", "null"},
    {"index_n_heads", "null"},
    {"index_topk", "null"},
    {"compression_config", "null"},
    {"per_layer_config", "{}"},
    {"pruned_heads", "{}"},
};

// Two names of one field (Transformers' attribute_map): either, or both when they agree.
void RefuseConflict(JsonFields& fields, std::string_view name, std::string_view alias) {
  const nlohmann::json* a = fields.Find(name);
  const nlohmann::json* b = fields.Find(alias);
  if (a != nullptr && b != nullptr && *a != *b) {
    fields.Refuse(name, absl::StrCat("equal to ", std::string(alias), ", which is ", Shown(*b)));
  }
}

void ReadArchitecture(JsonFields& fields) {
  constexpr char kArchitecture[] = "DeepseekV3ForCausalLM";
  // Kimi-K2 calls the same architecture by a name of its own.
  const nlohmann::json* type = fields.Find("model_type");
  if (type == nullptr || (*type != "deepseek_v3" && *type != "kimi_k2")) {
    fields.Refuse("model_type", R"("deepseek_v3" or "kimi_k2")");
  }
  const nlohmann::json* names = fields.Find("architectures");
  if (names != nullptr && *names != nlohmann::json::array({kArchitecture})) {
    fields.Refuse("architectures", absl::StrCat("[\"", kArchitecture, "\"]"));
  }
  for (std::string_view name : kInertFields) fields.Ignore(name);
  for (const FixedField& field : kFixedFields) {
    fields.Only(field.name, nlohmann::json::parse(field.supported));
  }
  if (const nlohmann::json* types = fields.Find("layer_types"); types != nullptr) {
    bool full = types->is_array();
    for (const nlohmann::json& type : *types) full = full && type == "full_attention";
    if (!full) fields.Refuse("layer_types", "a list of \"full_attention\"");
  }
}

void ReadSizes(JsonFields& fields, ModelConfig& config) {
  config.vocab_size = 129280;
  config.hidden_size = 7168;
  config.num_hidden_layers = 61;
  config.intermediate_size = 18432;
  config.max_position_embeddings = 4096;
  fields.Int("vocab_size", 1, kMaxVocab, &config.vocab_size);
  fields.Int("hidden_size", 1, kMaxDim, &config.hidden_size);
  fields.Int("num_hidden_layers", 1, kMaxLayers, &config.num_hidden_layers);
  fields.Int("intermediate_size", 1, kMaxDim, &config.intermediate_size);
  fields.Int("max_position_embeddings", 1, kMaxPositions, &config.max_position_embeddings);
  fields.Float("rms_norm_eps", 0, 1, &config.rms_norm_eps);
  fields.Bool("tie_word_embeddings", &config.tie_word_embeddings);
  // Transformers' default is 1, whether or not there is such a layer: it is optional in a
  // checkpoint.
  config.num_nextn_predict_layers = 1;
  RefuseConflict(fields, "num_nextn_predict_layers", "num_mtp_layers");
  fields.Int("num_mtp_layers", 0, 16, &config.num_nextn_predict_layers);
  fields.Int("num_nextn_predict_layers", 0, 16, &config.num_nextn_predict_layers);
}

// `dtype`, or its old name. Each tensor says itself what it is: this is for the memory plan.
void ReadDType(JsonFields& fields, ModelConfig& config) {
  const char* name = fields.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  fields.Ignore("torch_dtype");
  const nlohmann::json* dtype = fields.Find(name);
  if (dtype == nullptr || *dtype == "bfloat16") return;
  if (*dtype != "float32") return fields.Refuse(name, R"("bfloat16" or "float32")");
  config.dtype_bytes = 4;
}

void ReadTokenIds(JsonFields& fields, ModelConfig& config) {
  config.bos_token_id = 0;
  config.eos_token_ids = {1};
  std::optional<int32_t> pad_token_id;
  const int64_t last = config.vocab_size - 1;
  // Kept when the config says nothing and the vocabulary has no such token.
  if (config.vocab_size < 2) config.eos_token_ids = {};
  fields.OptionalInt("bos_token_id", 0, last, &config.bos_token_id);
  fields.OptionalInt("pad_token_id", -1, last, &pad_token_id);  // -1: none, in some checkpoints
  fields.Ints("eos_token_id", 0, last, &config.eos_token_ids);
}

void ReadMoe(JsonFields& fields, ModelConfig& config) {
  config.first_k_dense_replace = 3;
  config.moe_intermediate_size = 2048;
  config.n_routed_experts = 256;
  config.n_shared_experts = 1;
  config.num_experts_per_tok = 8;
  config.n_group = 8;
  config.topk_group = 4;
  config.routed_scaling_factor = 2.5f;
  fields.Int("first_k_dense_replace", 0, kMaxLayers, &config.first_k_dense_replace);
  fields.Int("moe_intermediate_size", 1, kMaxDim, &config.moe_intermediate_size);
  RefuseConflict(fields, "n_routed_experts", "num_local_experts");
  fields.Int("num_local_experts", 2, kMaxDim, &config.n_routed_experts);
  fields.Int("n_routed_experts", 2, kMaxDim, &config.n_routed_experts);
  fields.Int("n_shared_experts", 0, kMaxDim, &config.n_shared_experts);
  fields.Int("num_experts_per_tok", 1, kMaxDim, &config.num_experts_per_tok);
  fields.Int("n_group", 1, kMaxDim, &config.n_group);
  fields.Int("topk_group", 1, kMaxDim, &config.topk_group);
  fields.Float("routed_scaling_factor", 0, kMaxFloat, &config.routed_scaling_factor);
  fields.Bool("norm_topk_prob", &config.norm_topk_prob);
  if (!fields.status().ok()) return;

  if (config.n_routed_experts % config.n_group != 0) {
    return fields.Refuse("n_group", absl::StrCat("a divisor of n_routed_experts, which is ",
                                                 config.n_routed_experts));
  }
  // A group's score is the sum of its two best experts.
  const int32_t group_size = config.n_routed_experts / config.n_group;
  if (group_size < 2) {
    return fields.Refuse("n_group", absl::StrCat("at most half of n_routed_experts, which is ",
                                                 config.n_routed_experts));
  }
  if (config.topk_group > config.n_group) {
    return fields.Refuse("topk_group", absl::StrCat("at most n_group, which is ", config.n_group));
  }
  if (config.num_experts_per_tok > config.topk_group * group_size) {
    return fields.Refuse("num_experts_per_tok",
                         absl::StrCat("at most the ", config.topk_group * group_size,
                                      " experts of ", config.topk_group, " groups"));
  }
  if (int64_t{config.n_shared_experts} * config.moe_intermediate_size > kMaxDim) {
    return fields.Refuse("n_shared_experts",
                         absl::StrCat("at most ", kMaxDim, " / moe_intermediate_size, ",
                                      "which is ", config.moe_intermediate_size));
  }
  const int64_t layers = int64_t{config.num_hidden_layers} + config.num_nextn_predict_layers;
  if (config.n_routed_experts * layers > kMaxExpertsOfAllLayers) {
    return fields.Refuse("n_routed_experts", absl::StrCat("at most ", kMaxExpertsOfAllLayers,
                                                          " over all ", layers, " layers"));
  }
}

void ReadAttention(JsonFields& fields, ModelConfig& config) {
  config.num_attention_heads = 128;
  config.q_lora_rank = 1536;
  config.kv_lora_rank = 512;
  config.qk_nope_head_dim = 128;
  config.qk_rope_head_dim = 64;
  config.v_head_dim = 128;
  fields.Int("num_attention_heads", 1, kMaxDim, &config.num_attention_heads);
  fields.OptionalInt("q_lora_rank", 1, kMaxDim, &config.q_lora_rank);
  fields.Int("kv_lora_rank", 1, kMaxDim, &config.kv_lora_rank);
  fields.Int("qk_nope_head_dim", 1, kMaxDim, &config.qk_nope_head_dim);
  fields.Int("qk_rope_head_dim", 2, kMaxDim, &config.qk_rope_head_dim);
  fields.Int("v_head_dim", 1, kMaxDim, &config.v_head_dim);
  fields.Bool("attention_bias", &config.attention_bias);
  if (!fields.status().ok()) return;

  if (config.qk_rope_head_dim % 2 != 0) fields.Refuse("qk_rope_head_dim", "even");
  // Every head has its own keys and values, made from the one latent.
  fields.Only("num_key_value_heads", config.num_attention_heads);
  // Transformers' name for the rotary part, written into config.json by some of its versions.
  fields.Only("head_dim", config.qk_rope_head_dim);
  fields.Only("qk_head_dim", config.qk_head_dim());
  const int64_t widest =
      std::max(config.qk_head_dim(), config.qk_nope_head_dim + config.v_head_dim);
  if (config.num_attention_heads * widest > std::numeric_limits<int32_t>::max()) {
    fields.Refuse("num_attention_heads",
                  absl::StrCat("at most ", std::numeric_limits<int32_t>::max() / widest,
                               " with heads that are ", widest, " wide"));
  }
}

void ReadYarn(JsonFields& rope, JsonFields& fields, ModelConfig& config) {
  YarnScaling yarn;
  yarn.original_max_position_embeddings = config.max_position_embeddings;
  rope.Int("original_max_position_embeddings", 1, kMaxPositions,
           &yarn.original_max_position_embeddings);
  // A field of the top level wins: it is where some checkpoints keep the value of pre-training.
  fields.Int("original_max_position_embeddings", 1, kMaxPositions,
             &yarn.original_max_position_embeddings);
  if (rope.Find("factor") == nullptr) rope.Refuse("factor", "a number >= 1");
  rope.Float("factor", 1, kMaxFloat, &yarn.factor);
  std::optional<float> beta_fast, beta_slow, mscale, mscale_all_dim;
  std::optional<bool> truncate;
  constexpr double kMinBeta = 1e-6;
  rope.OptionalFloat("beta_fast", kMinBeta, kMaxFloat, &beta_fast);
  rope.OptionalFloat("beta_slow", kMinBeta, kMaxFloat, &beta_slow);
  rope.OptionalFloat("mscale", 0, kMaxFloat, &mscale);
  rope.OptionalFloat("mscale_all_dim", 0, kMaxFloat, &mscale_all_dim);
  rope.OptionalFloat("attention_factor", 0, kMaxFloat, &yarn.attention_factor);
  rope.OptionalBool("truncate", &truncate);
  yarn.beta_fast = beta_fast.value_or(yarn.beta_fast);
  yarn.beta_slow = beta_slow.value_or(yarn.beta_slow);
  yarn.mscale = mscale.value_or(yarn.mscale);
  yarn.mscale_all_dim = mscale_all_dim.value_or(yarn.mscale_all_dim);
  yarn.truncate = truncate.value_or(yarn.truncate);
  if (yarn.beta_fast < yarn.beta_slow) {
    rope.Refuse("beta_fast", absl::StrCat("at least beta_slow, which is ", yarn.beta_slow));
  }
  config.yarn = yarn;
}

// `rope_scaling` beside `rope_theta` (the old form), or both in `rope_parameters` (Transformers 5).
absl::Status ReadRope(JsonFields& fields, ModelConfig& config) {
  fields.Bool("rope_interleave", &config.rope_interleave);
  constexpr double kMinTheta = 1.0001;  // YaRN divides by its logarithm
  fields.Float("rope_theta", kMinTheta, kMaxFloat * 1e3, &config.rope_theta);
  const nlohmann::json* scaling = fields.Find("rope_scaling");
  const nlohmann::json* parameters = fields.Find("rope_parameters");
  if (scaling != nullptr && parameters != nullptr && *scaling != *parameters) {
    fields.Refuse("rope_scaling", "absent when there is rope_parameters");
  }
  const std::string name = parameters != nullptr ? "rope_parameters" : "rope_scaling";
  const nlohmann::json* object = parameters != nullptr ? parameters : scaling;
  fields.Ignore("original_max_position_embeddings");
  if (object == nullptr) return fields.status();
  if (!object->is_object()) fields.Refuse(name, "an object or null");
  RETURN_IF_ERROR(fields.status());

  JsonFields rope(*object, "config.json", name + ".");
  rope.Float("rope_theta", kMinTheta, kMaxFloat * 1e3, &config.rope_theta);
  rope.Only("partial_rotary_factor", 1.0);
  for (const auto& [field, value] : object->items()) {
    // Of models whose layers differ: {"full_attention": {...}, "sliding_attention": {...}}.
    if (value.is_object()) rope.Refuse(field, "a number, text or null: all layers have one RoPE");
  }
  RefuseConflict(rope, "rope_type", "type");
  const std::string type_name = rope.Find("rope_type") != nullptr ? "rope_type" : "type";
  std::string type = "default";
  if (rope.Find(type_name) != nullptr) rope.String(type_name, &type);
  if (type == "yarn") {
    ReadYarn(rope, fields, config);
  } else if (type != "default") {
    rope.Refuse(type_name, "\"yarn\" or \"default\"");
  }
  RETURN_IF_ERROR(rope.status());
  for (std::string& unknown : rope.UnknownFields()) {
    config.unknown_fields.push_back(std::move(unknown));
  }
  return fields.status();
}

absl::Status ReadQuantization(JsonFields& fields, ModelConfig& config) {
  const nlohmann::json* object = fields.Find("quantization_config");
  if (object == nullptr) return fields.status();
  if (!object->is_object()) fields.Refuse("quantization_config", "an object or null");
  RETURN_IF_ERROR(fields.status());

  JsonFields quantization(*object, "config.json", "quantization_config.");
  Fp8Quantization fp8;
  if (quantization.Find("quant_method") == nullptr) quantization.Refuse("quant_method", "\"fp8\"");
  quantization.Only("quant_method", "fp8");
  quantization.Only("fmt", "e4m3");
  quantization.Only("activation_scheme", "dynamic");
  quantization.Only("scale_fmt", "ue8m0");
  fp8.power_of_two_scales = quantization.Find("scale_fmt") != nullptr;
  if (quantization.Find("weight_block_size") != nullptr) {
    std::vector<int32_t> block;
    quantization.Ints("weight_block_size", 1, kMaxDim, &block);
    if (block.size() != 2) quantization.Refuse("weight_block_size", "a list of two integers >= 1");
    if (quantization.status().ok()) fp8 = {block[0], block[1], fp8.power_of_two_scales};
  }
  // Which weights are FP8 is seen from the weights.
  quantization.Ignore("modules_to_not_convert");
  quantization.Ignore("ignored_layers");
  quantization.Ignore("dequantize");
  RETURN_IF_ERROR(quantization.status());
  for (std::string& unknown : quantization.UnknownFields()) {
    config.unknown_fields.push_back(std::move(unknown));
  }
  config.quantization = fp8;
  return absl::OkStatus();
}

float YarnMscale(float factor, float mscale) {
  return factor <= 1.0f ? 1.0f : 0.1f * mscale * std::log(factor) + 1.0f;
}

}  // namespace

float YarnScaling::cos_sin_scale() const {
  if (attention_factor) return *attention_factor;
  if (mscale == 0 || mscale_all_dim == 0) return YarnMscale(factor, 1.0f);
  return YarnMscale(factor, mscale) / YarnMscale(factor, mscale_all_dim);
}

float YarnScaling::softmax_scale() const {
  const float scale = mscale_all_dim == 0 ? 1.0f : YarnMscale(factor, mscale_all_dim);
  return scale * scale;
}

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json) {
  if (json.size() > kMaxConfigBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("config.json: has ", json.size(), " bytes; the limit is ", kMaxConfigBytes));
  }
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(json, "config.json"));
  ModelConfig config;
  JsonFields fields(object, "config.json");
  ReadArchitecture(fields);
  ReadSizes(fields, config);
  ReadDType(fields, config);
  ReadTokenIds(fields, config);
  ReadMoe(fields, config);
  ReadAttention(fields, config);
  RETURN_IF_ERROR(ReadRope(fields, config));
  RETURN_IF_ERROR(ReadQuantization(fields, config));
  RETURN_IF_ERROR(fields.status());
  for (std::string& unknown : fields.UnknownFields()) {
    config.unknown_fields.push_back(std::move(unknown));
  }
  return config;
}

absl::StatusOr<ModelConfig> LoadModelConfig(const std::filesystem::path& dir) {
  const std::filesystem::path file = dir / "config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadTextFile(file, kMaxConfigBytes));
  absl::StatusOr<ModelConfig> config = ParseModelConfig(text);
  if (!config.ok()) {
    return absl::Status(config.status().code(),
                        absl::StrCat((dir / "").string(), config.status().message()));
  }
  return config;
}

}  // namespace latentd
