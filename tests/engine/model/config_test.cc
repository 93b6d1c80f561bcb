#include "engine/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

json Base() { return json::parse(ReadAll("deploy/configs/deepseek-v3.json")); }

// DeepSeek-V3's config with some fields replaced; `patch` is JSON.
absl::StatusOr<ModelConfig> ParseWith(const std::string& patch) {
  json config = Base();
  config.update(json::parse(patch));
  return ParseModelConfig(config.dump());
}

std::string Message(const absl::StatusOr<ModelConfig>& config) {
  return config.ok() ? "OK" : std::string(config.status().message());
}

TEST(ConfigTest, DeepSeekV3) {
  const auto config = ParseModelConfig(Base().dump());
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->vocab_size, 129280);
  EXPECT_EQ(config->hidden_size, 7168);
  EXPECT_EQ(config->num_hidden_layers, 61);
  EXPECT_EQ(config->first_k_dense_replace, 3);
  EXPECT_EQ(config->intermediate_size, 18432);
  EXPECT_EQ(config->moe_intermediate_size, 2048);
  EXPECT_EQ(config->n_routed_experts, 256);
  EXPECT_EQ(config->n_shared_experts, 1);
  EXPECT_EQ(config->num_experts_per_tok, 8);
  EXPECT_EQ(config->n_group, 8);
  EXPECT_EQ(config->topk_group, 4);
  EXPECT_EQ(config->routed_scaling_factor, 2.5f);
  EXPECT_TRUE(config->norm_topk_prob);
  EXPECT_EQ(config->num_attention_heads, 128);
  EXPECT_EQ(config->q_lora_rank, 1536);
  EXPECT_EQ(config->latent_dim(), 576);
  EXPECT_EQ(config->qk_head_dim(), 192);
  EXPECT_EQ(config->v_head_dim, 128);
  EXPECT_TRUE(config->rope_interleave);
  EXPECT_EQ(config->rope_theta, 10000.0f);
  ASSERT_TRUE(config->yarn);
  EXPECT_EQ(config->yarn->factor, 40.0f);
  EXPECT_EQ(config->yarn->original_max_position_embeddings, 4096);
  EXPECT_FLOAT_EQ(config->yarn->cos_sin_scale(), 1.0f);
  EXPECT_FLOAT_EQ(config->yarn->softmax_scale(), std::pow(0.1f * std::log(40.0f) + 1.0f, 2.0f));
  EXPECT_EQ(config->max_position_embeddings, 163840);
  EXPECT_EQ(config->num_nextn_predict_layers, 1);
  ASSERT_TRUE(config->quantization);
  EXPECT_EQ(config->quantization->block_rows, 128);
  EXPECT_EQ(config->bos_token_id, 0);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1));
  EXPECT_THAT(config->unknown_fields, IsEmpty());
}

TEST(ConfigTest, EveryExampleIsAccepted) {
  int num_configs = 0;
  for (const auto& entry : std::filesystem::directory_iterator("deploy/configs")) {
    if (entry.path().extension() != ".json") continue;
    const auto config = ParseModelConfig(ReadAll(entry.path()));
    EXPECT_TRUE(config.ok()) << entry.path() << ": " << config.status();
    if (config.ok()) {
      EXPECT_THAT(config->unknown_fields, IsEmpty()) << entry.path();
    }
    ++num_configs;
  }
  EXPECT_GE(num_configs, 4);
  for (const auto& entry : std::filesystem::directory_iterator(kVariants)) {
    const auto config = LoadModelConfig(entry.path());
    EXPECT_TRUE(config.ok()) << config.status();
  }
}

// A config that says nothing is Transformers' DeepseekV3Config().
TEST(ConfigTest, AbsentFieldsHaveTransformersDefaults) {
  const auto config = ParseModelConfig(R"({"model_type": "deepseek_v3"})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->hidden_size, 7168);
  EXPECT_EQ(config->n_routed_experts, 256);
  EXPECT_EQ(config->topk_group, 4);
  EXPECT_EQ(config->q_lora_rank, 1536);
  EXPECT_EQ(config->max_position_embeddings, 4096);
  EXPECT_EQ(config->num_nextn_predict_layers, 1);
  EXPECT_EQ(config->rms_norm_eps, 1e-6f);
  EXPECT_FALSE(config->yarn);
  EXPECT_FALSE(config->quantization);
  EXPECT_FALSE(config->tie_word_embeddings);
}

TEST(ConfigTest, Honoured) {
  EXPECT_TRUE(ParseWith(R"({"model_type": "kimi_k2"})").ok());
  EXPECT_EQ(ParseWith(R"({"q_lora_rank": null})")->q_lora_rank, std::nullopt);
  EXPECT_EQ(ParseWith(R"({"n_group": 1, "topk_group": 1})")->n_group, 1);
  EXPECT_TRUE(ParseWith(R"({"attention_bias": true})")->attention_bias);
  EXPECT_TRUE(ParseWith(R"({"tie_word_embeddings": true})")->tie_word_embeddings);
  EXPECT_FALSE(ParseWith(R"({"rope_interleave": false})")->rope_interleave);
  EXPECT_FALSE(ParseWith(R"({"norm_topk_prob": false})")->norm_topk_prob);
  EXPECT_EQ(ParseWith(R"({"n_shared_experts": 0})")->n_shared_experts, 0);
  EXPECT_TRUE(ParseWith(R"({"first_k_dense_replace": 0})")->is_moe_layer(0));
  EXPECT_FALSE(ParseWith(R"({"first_k_dense_replace": 61})")->is_moe_layer(60));
  EXPECT_TRUE(ParseWith(R"({"num_key_value_heads": null})").ok());
  EXPECT_TRUE(ParseWith(R"({"head_dim": 64, "qk_head_dim": 192})").ok());
  EXPECT_TRUE(ParseWith(R"({"bos_token_id": null, "eos_token_id": null})")->eos_token_ids.empty());
  EXPECT_THAT(ParseWith(R"({"eos_token_id": [1, 7]})")->eos_token_ids, ElementsAre(1, 7));
  EXPECT_EQ(ParseWith(R"({"dtype": "float32"})")->dtype_bytes, 4);
  EXPECT_EQ(ParseWith(R"({"torch_dtype": "bfloat16"})")->dtype_bytes, 2);
}

// Transformers' other names of two fields.
TEST(ConfigTest, Aliases) {
  json config = Base();
  config.erase("n_routed_experts");
  config.erase("num_nextn_predict_layers");
  config["num_local_experts"] = 64;
  config["num_mtp_layers"] = 3;
  const auto parsed = ParseModelConfig(config.dump());
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->n_routed_experts, 64);
  EXPECT_EQ(parsed->num_nextn_predict_layers, 3);
  EXPECT_THAT(
      Message(ParseWith(R"({"num_local_experts": 64})")),
      HasSubstr("n_routed_experts is 256; must be equal to num_local_experts, which is 64"));
  EXPECT_THAT(Message(ParseWith(R"({"num_mtp_layers": 2})")),
              HasSubstr("num_nextn_predict_layers"));
}

TEST(ConfigTest, Rope) {
  EXPECT_FALSE(ParseWith(R"({"rope_scaling": null})")->yarn);
  EXPECT_FALSE(ParseWith(R"({"rope_scaling": {"rope_type": "default"}})")->yarn);

  // Transformers 5 keeps all of it in rope_parameters.
  const auto config = ParseWith(R"({"rope_scaling": null, "rope_parameters": {"rope_type": "yarn",
      "rope_theta": 50000.0, "factor": 32, "beta_fast": null, "attention_factor": 1.5,
      "truncate": false, "mscale_all_dim": 0.5}})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->rope_theta, 50000.0f);
  EXPECT_EQ(config->yarn->factor, 32.0f);
  EXPECT_EQ(config->yarn->original_max_position_embeddings,
            163840);  // the default: the whole length
  EXPECT_EQ(config->yarn->beta_fast, 32.0f);
  EXPECT_EQ(config->yarn->beta_slow, 1.0f);
  EXPECT_EQ(config->yarn->cos_sin_scale(), 1.5f);
  EXPECT_FALSE(config->yarn->truncate);

  // A top-level field wins over the one of pre-training within.
  EXPECT_EQ(ParseWith(R"({"original_max_position_embeddings": 1024})")
                ->yarn->original_max_position_embeddings,
            1024);

  // Only both mscales make a ratio; one alone does not scale cos and sin.
  YarnScaling yarn;
  yarn.factor = 8.0f;
  const float plain = 0.1f * std::log(8.0f) + 1.0f;
  EXPECT_FLOAT_EQ(yarn.cos_sin_scale(), plain);
  EXPECT_EQ(yarn.softmax_scale(), 1.0f);
  yarn.mscale_all_dim = 0.5f;
  EXPECT_FLOAT_EQ(yarn.cos_sin_scale(), plain);
  EXPECT_FLOAT_EQ(yarn.softmax_scale(), std::pow(0.05f * std::log(8.0f) + 1.0f, 2.0f));
  yarn.mscale = 1.0f;
  EXPECT_FLOAT_EQ(yarn.cos_sin_scale(), plain / (0.05f * std::log(8.0f) + 1.0f));
  yarn.factor = 1.0f;
  EXPECT_EQ(yarn.cos_sin_scale(), 1.0f);
}

TEST(ConfigTest, Quantization) {
  EXPECT_FALSE(ParseWith(R"({"quantization_config": null})")->quantization);
  const auto blocks = ParseWith(
      R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 32]}})");
  EXPECT_EQ(blocks->quantization->block_rows, 64);
  EXPECT_EQ(blocks->quantization->block_cols, 32);
  EXPECT_FALSE(blocks->quantization->power_of_two_scales);
  const auto v31 = ParseWith(R"({"quantization_config": {"quant_method": "fp8", "fmt": "e4m3",
      "activation_scheme": "dynamic", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}})");
  EXPECT_TRUE(v31->quantization->power_of_two_scales);
}

TEST(ConfigTest, UnknownFieldsAreReportedNotRefused) {
  const auto config =
      ParseWith(R"({"zz_new": 1, "rope_scaling": {"type": "yarn", "factor": 2, "foo": 1},
      "quantization_config": {"quant_method": "fp8", "bar": 1}, "seq_aux": true, "auto_map": {}})");
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_THAT(config->unknown_fields,
              ElementsAre("rope_scaling.foo", "quantization_config.bar", "zz_new"));
}

struct Refusal {
  const char* patch;
  const char* message;  // a part of it
};

class RefusalTest : public testing::TestWithParam<Refusal> {};

TEST_P(RefusalTest, NamesTheFieldItsValueAndWhatIsSupported) {
  const auto config = ParseWith(GetParam().patch);
  ASSERT_FALSE(config.ok()) << GetParam().patch;
  EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(config), AllOf(HasSubstr("config.json: "), HasSubstr(GetParam().message)));
}

constexpr Refusal kRefusals[] = {
    {R"({"model_type": "deepseek_v2"})",
     R"(model_type is "deepseek_v2"; must be "deepseek_v3" or "kimi_k2")"},
    {R"({"model_type": null})", "model_type is null"},
    {R"({"architectures": ["LlamaForCausalLM"]})", R"(architectures is ["LlamaForCausalLM"])"},
    // Sizes.
    {R"({"vocab_size": 0})", "vocab_size is 0; must be an integer in [1, 16777216]"},
    {R"({"vocab_size": "129280"})", R"(vocab_size is "129280"; must be an integer)"},
    {R"({"hidden_size": -7168})", "hidden_size is -7168; must be"},
    {R"({"hidden_size": 7168.0})", "hidden_size is 7168.0; must be an integer"},
    {R"({"hidden_size": null})", "hidden_size is null"},
    {R"({"hidden_size": 99999999999999999999})", "hidden_size is "},
    {R"({"hidden_size": 18446744073709551615})", "hidden_size is 18446744073709551615"},
    {R"({"hidden_size": true})", "hidden_size is true"},
    {R"({"num_hidden_layers": 0})", "num_hidden_layers is 0"},
    {R"({"num_hidden_layers": 1000000})", "num_hidden_layers is 1000000"},
    {R"({"intermediate_size": 0})", "intermediate_size is 0"},
    {R"({"max_position_embeddings": 0})", "max_position_embeddings is 0"},
    {R"({"rms_norm_eps": -1e-6})", "rms_norm_eps is -1e-06; must be a number in [0, 1]"},
    {R"({"rms_norm_eps": "1e-6"})", "rms_norm_eps is"},
    {R"({"tie_word_embeddings": 1})", "tie_word_embeddings is 1; must be true or false"},
    {R"({"num_nextn_predict_layers": -1})", "num_nextn_predict_layers is -1"},
    {R"({"num_nextn_predict_layers": 17})", "num_nextn_predict_layers is 17"},
    {R"({"torch_dtype": "float16"})",
     R"(torch_dtype is "float16"; must be "bfloat16" or "float32")"},
    {R"({"dtype": "float64"})", R"(dtype is "float64")"},
    // Tokens.
    {R"({"bos_token_id": 129280})",
     "bos_token_id is 129280; must be an integer in [0, 129279] or null"},
    {R"({"eos_token_id": -1})", "eos_token_id is -1"},
    {R"({"eos_token_id": [1, 129280]})", "eos_token_id is [1,129280]"},
    {R"({"eos_token_id": "1"})", "eos_token_id is \"1\""},
    {R"({"pad_token_id": 129280})", "pad_token_id is 129280"},
    // Experts.
    {R"({"first_k_dense_replace": -1})", "first_k_dense_replace is -1"},
    {R"({"first_k_dense_replace": null})", "first_k_dense_replace is null"},
    {R"({"moe_intermediate_size": 0})", "moe_intermediate_size is 0"},
    {R"({"n_routed_experts": 1})", "n_routed_experts is 1"},
    {R"({"n_routed_experts": 65536})",
     "n_routed_experts is 65536; must be at most 1048576 over all"},
    {R"({"n_shared_experts": -1})", "n_shared_experts is -1"},
    {R"({"n_shared_experts": 1000000})", "n_shared_experts is 1000000"},
    {R"({"num_experts_per_tok": 0})", "num_experts_per_tok is 0"},
    {R"({"num_experts_per_tok": 129})",
     "num_experts_per_tok is 129; must be at most the 128 experts of 4 groups"},
    {R"({"n_group": 0})", "n_group is 0"},
    {R"({"n_group": 7})", "n_group is 7; must be a divisor of n_routed_experts, which is 256"},
    {R"({"n_group": 256})", "n_group is 256; must be at most half of n_routed_experts"},
    {R"({"n_group": null})", "n_group is null"},
    {R"({"topk_group": 9})", "topk_group is 9; must be at most n_group, which is 8"},
    {R"({"topk_group": 0})", "topk_group is 0"},
    {R"({"routed_scaling_factor": -1})", "routed_scaling_factor is -1"},
    {R"({"norm_topk_prob": "yes"})", "norm_topk_prob is \"yes\""},
    {R"({"scoring_func": "softmax"})", R"(scoring_func is "softmax"; must be "sigmoid")"},
    {R"({"topk_method": "greedy"})", R"(topk_method is "greedy"; must be "noaux_tc")"},
    {R"({"moe_layer_freq": 2})", "moe_layer_freq is 2; must be 1"},
    {R"({"hidden_act": "gelu"})", R"(hidden_act is "gelu"; must be "silu")"},
    // Attention.
    {R"({"num_attention_heads": 0})", "num_attention_heads is 0"},
    {R"({"num_attention_heads": 1048576, "num_key_value_heads": null, "v_head_dim": 4096})",
     "num_attention_heads is 1048576; must be at most 508400"},
    {R"({"num_key_value_heads": 8})", "num_key_value_heads is 8; must be 128"},
    {R"({"q_lora_rank": 0})", "q_lora_rank is 0; must be an integer in [1, 1048576] or null"},
    {R"({"kv_lora_rank": null})", "kv_lora_rank is null"},
    {R"({"kv_lora_rank": 0})", "kv_lora_rank is 0"},
    {R"({"qk_nope_head_dim": 0})", "qk_nope_head_dim is 0"},
    {R"({"qk_rope_head_dim": 63})", "qk_rope_head_dim is 63; must be even"},
    {R"({"qk_rope_head_dim": 0})", "qk_rope_head_dim is 0"},
    {R"({"v_head_dim": -128})", "v_head_dim is -128"},
    {R"({"head_dim": 192})", "head_dim is 192; must be 64"},
    {R"({"qk_head_dim": 128})", "qk_head_dim is 128; must be 192"},
    {R"({"attention_bias": null})", "attention_bias is null"},
    // RoPE.
    {R"({"rope_interleave": null})", "rope_interleave is null"},
    {R"({"rope_theta": 0})", "rope_theta is 0"},
    {R"({"rope_theta": 1e300})", "rope_theta is 1e+300"},
    {R"({"partial_rotary_factor": 0.5})", "partial_rotary_factor is 0.5; must be 1.0"},
    {R"({"rope_scaling": "yarn"})", R"(rope_scaling is "yarn"; must be an object or null)"},
    {R"({"rope_scaling": {"type": "linear", "factor": 2}})",
     R"(rope_scaling.type is "linear"; must be "yarn" or "default")"},
    {R"({"rope_scaling": {"rope_type": "llama3", "factor": 2}})",
     R"(rope_scaling.rope_type is "llama3")"},
    {R"({"rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2}})",
     R"(rope_scaling.rope_type is "yarn"; must be equal to type, which is "linear")"},
    {R"({"rope_scaling": {"type": "yarn"}})",
     "rope_scaling.factor is absent; must be a number >= 1"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 0.5}})", "rope_scaling.factor is 0.5"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "original_max_position_embeddings": 0}})",
     "rope_scaling.original_max_position_embeddings is 0"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "beta_fast": 0.5}})",
     "rope_scaling.beta_fast is 0.5; must be at least beta_slow, which is 1"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": -1}})",
     "rope_scaling.mscale is -1"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "truncate": 1}})",
     "rope_scaling.truncate is 1"},
    {R"({"rope_scaling": {"type": "yarn", "factor": 2, "partial_rotary_factor": 0.5}})",
     "rope_scaling.partial_rotary_factor is 0.5"},
    {R"({"rope_scaling": {"full_attention": {"rope_type": "yarn", "factor": 2}}})",
     "rope_scaling.full_attention is an object; must be a number, text or null"},
    {R"({"rope_parameters": {"rope_type": "default", "rope_theta": 5}})",
     "rope_scaling is an object; must be absent when there is rope_parameters"},
    // Quantisation.
    {R"({"quantization_config": {}})",
     "quantization_config.quant_method is absent; must be \"fp8\""},
    {R"({"quantization_config": []})", "quantization_config is []"},
    {R"({"quantization_config": {"quant_method": "awq"}})",
     R"(quantization_config.quant_method is "awq"; must be "fp8")"},
    {R"({"quantization_config": {"quant_method": "fp8", "fmt": "e5m2"}})",
     R"(quantization_config.fmt is "e5m2"; must be "e4m3")"},
    {R"({"quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}})",
     R"(quantization_config.activation_scheme is "static")"},
    {R"({"quantization_config": {"quant_method": "fp8", "scale_fmt": "float"}})",
     "quantization_config.scale_fmt is \"float\""},
    {R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}})",
     "quantization_config.weight_block_size is [128]; must be a list of two"},
    {R"({"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 128]}})",
     "quantization_config.weight_block_size is [0,128]"},
    {R"({"compression_config": {"a": 1}})", "compression_config is an object; must be null"},
    // Of other architectures.
    {R"({"mlp_bias": true})", "mlp_bias is true; must be false"},
    {R"({"qk_layernorm": true})", "qk_layernorm is true"},
    {R"({"sliding_window": 4096})", "sliding_window is 4096; must be null"},
    {R"({"final_logit_softcapping": 30.0})", "final_logit_softcapping is 30.0"},
    {R"({"index_topk": 2048})", "index_topk is 2048; must be null"},
    {R"({"layer_types": ["full_attention", "sliding_attention"]})", "layer_types is"},
    {R"({"layer_types": 3})", "layer_types is 3"},
    {R"({"is_encoder_decoder": true})", "is_encoder_decoder is true"},
    {R"({"per_layer_config": {"3": {}}})", "per_layer_config is an object"},
};
INSTANTIATE_TEST_SUITE_P(Fields, RefusalTest, testing::ValuesIn(kRefusals));

TEST(ConfigTest, NotJson) {
  EXPECT_THAT(Message(ParseModelConfig("")), HasSubstr("config.json: "));
  EXPECT_THAT(Message(ParseModelConfig("{\"hidden_size\": ")), HasSubstr("parse error at line 1"));
  EXPECT_THAT(Message(ParseModelConfig("[]")), HasSubstr("is array, must be a JSON object"));
  EXPECT_THAT(Message(ParseModelConfig("null")), HasSubstr("is null"));
  EXPECT_THAT(Message(ParseModelConfig("{\"a\": 1e999}")), HasSubstr("config.json: "));
  EXPECT_THAT(Message(ParseModelConfig("{\"a\": \"\xff\"}")), HasSubstr("config.json: "));
  EXPECT_THAT(Message(ParseModelConfig(R"({"n_group": 1, "n_group": 8})")),
              HasSubstr("'n_group' occurs twice"));
  EXPECT_THAT(Message(ParseModelConfig(R"({"rope_scaling": {"type": "yarn", "type": "linear"}})")),
              HasSubstr("'type' occurs twice"));
}

TEST(ConfigTest, HostileNestingAndSize) {
  for (const char* open : {"[", "{\"a\":"}) {
    std::string deep = "{\"a\":";
    for (int i = 0; i < 100'000; ++i) deep += open;
    EXPECT_THAT(Message(ParseModelConfig(deep)), HasSubstr("nested deeper than 32 levels"));
  }
  const std::string long_name(5000, 'x');
  const auto config = ParseWith("{\"" + long_name + "\": 1}");
  ASSERT_TRUE(config.ok());
  EXPECT_LT(config->unknown_fields[0].size(), 200u);
  EXPECT_THAT(Message(ParseWith("{\"hidden_size\": \"" + long_name + "\"}")), HasSubstr("..."));
  EXPECT_THAT(Message(ParseModelConfig(std::string(2 << 20, ' '))),
              HasSubstr("the limit is 1048576"));
}

TEST(ConfigTest, Files) {
  TempDir dir;
  EXPECT_EQ(LoadModelConfig(dir.path() / "none").status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(LoadModelConfig(dir.path()).status().code(), absl::StatusCode::kNotFound);
  std::filesystem::create_directory(dir.path() / "config.json");
  EXPECT_THAT(Message(LoadModelConfig(dir.path())), HasSubstr("config.json: not a regular file"));
  std::filesystem::remove(dir.path() / "config.json");
  WriteAll(dir.path() / "config.json", R"({"model_type": "llama"})");
  EXPECT_THAT(Message(LoadModelConfig(dir.path())),
              AllOf(HasSubstr(dir.path().string()), HasSubstr("model_type is \"llama\"")));
  WriteAll(dir.path() / "config.json", std::string(2 << 20, ' '));
  EXPECT_THAT(Message(LoadModelConfig(dir.path())), HasSubstr("larger than 1048576 bytes"));
}

}  // namespace
}  // namespace latentd
