#include "server/bench/roofline.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "engine/model/config.h"

namespace latentd {
namespace {

ModelConfig Load(const std::string& file) {
  // The example configurations are files, a model is a folder.
  std::string json;
  if (std::FILE* f = std::fopen(file.c_str(), "rb")) {
    char buffer[65536];
    json.assign(buffer, std::fread(buffer, 1, sizeof(buffer), f));
    std::fclose(f);
  }
  auto config = ParseModelConfig(json);
  EXPECT_TRUE(config.ok()) << file << ": " << config.status();
  return *config;
}

StepPlan Plan(int count, int computed, int tokens) {
  StepPlan plan;
  for (int i = 0; i < count; ++i) {
    SequenceStep& s = plan.sequences.emplace_back();
    s.num_computed_tokens = computed;
    s.num_tokens = tokens;
    s.sample = true;
  }
  plan.tokens.resize(size_t{1} * count * tokens);
  return plan;
}

double Milliseconds(const ModelConfig& model, const StepPlan& plan, const DeviceRates& rates) {
  return 1e3 * StepRoofline(model, plan, rates).seconds();
}

// The smallest model that has every part, by hand. No FP8: everything is bf16.
TEST(RooflineTest, ByHand) {
  ModelConfig m;
  m.vocab_size = 100;
  m.hidden_size = 10;
  m.num_hidden_layers = 3;
  m.first_k_dense_replace = 1;
  m.intermediate_size = 7;
  m.moe_intermediate_size = 5;
  m.n_routed_experts = 4;
  m.n_shared_experts = 1;
  m.num_experts_per_tok = 2;
  m.num_attention_heads = 2;
  m.q_lora_rank = 6;
  m.kv_lora_rank = 8;
  m.qk_nope_head_dim = 4;
  m.qk_rope_head_dim = 2;
  m.v_head_dim = 3;
  const DeviceRates rates = {.weight_bytes = 1,
                             .cache_bytes = 1,
                             .fp8_flops = 1,
                             .bf16_flops = 1e9,
                             .attention_flops = 1e9};
  const Roofline bytes = StepRoofline(m, Plan(2, 9, 1), rates);  // two tokens, ten keys each
  const double q_a = 10 * 6, q_b = 6 * 2 * 6, kv_a = 10 * 10, kv_b = 8 * 2 * 7, o = 2 * 3 * 10;
  EXPECT_DOUBLE_EQ(bytes.parts[0].bytes, 3 * 2 * (q_a + q_b + kv_a + kv_b + o));
  EXPECT_DOUBLE_EQ(bytes.parts[0].bf16_flops, 3 * 2 * 2 * (q_a + q_b + kv_a + o));
  EXPECT_EQ(bytes.parts[0].fp8_flops, 0);
  EXPECT_DOUBLE_EQ(bytes.parts[1].bytes, 2 * 10 * 3 * 10 * 2);
  // Absorbed: 2 heads, 10 pairs, 10 + 8 columns, and kv_b for the token; direct costs more.
  EXPECT_DOUBLE_EQ(bytes.parts[1].bf16_flops, 2 * 3 * (2 * 2 * 10 * 18 + 2 * kv_b));
  EXPECT_DOUBLE_EQ(bytes.parts[2].bytes, 2 * (3 * 10 * 7 + 2 * 3 * 10 * 5));
  // Two tokens that choose two of four: three of the four experts are hit.
  EXPECT_DOUBLE_EQ(ExpectedExperts(4, 2, 2), 3);
  EXPECT_DOUBLE_EQ(bytes.parts[3].bytes, 2 * 2 * 3 * (3 * 10 * 5));
  EXPECT_DOUBLE_EQ(bytes.parts[3].bf16_flops, 2 * 2 * 2 * 2 * (3 * 10 * 5));
  double sum = 0;
  for (const RooflinePart& part : bytes.parts) {
    EXPECT_DOUBLE_EQ(part.seconds, part.bytes) << part.name;
    sum += part.bytes;
  }
  EXPECT_DOUBLE_EQ(bytes.seconds(), sum);

  // Where arithmetic is slow it is the bound.
  const Roofline flops = StepRoofline(m, Plan(2, 9, 1),
                                      {.weight_bytes = 1e9,
                                       .cache_bytes = 1e9,
                                       .fp8_flops = 1,
                                       .bf16_flops = 2,
                                       .attention_flops = 4});
  EXPECT_DOUBLE_EQ(flops.parts[3].seconds, flops.parts[3].bf16_flops / 2);
  EXPECT_DOUBLE_EQ(flops.parts[1].seconds, flops.parts[1].bf16_flops / 4);
}

TEST(RooflineTest, OfALongPromptIsTheDirectFormOfAttention) {
  const ModelConfig m = Load("deploy/configs/shard16.json");
  const double pairs = 2048 * 2049 / 2.0, kv_b = 128 * 256 * 512.0;
  const Roofline roofline = StepRoofline(m, Plan(1, 0, 2048), kH100Peak);
  EXPECT_DOUBLE_EQ(roofline.parts[1].bf16_flops,
                   61 * (2 * 128 * pairs * (192 + 128) + 2 * 2048 * kv_b));
  // One token at the end of as many: absorbed.
  const Roofline decode = StepRoofline(m, Plan(1, 2047, 1), kH100Peak);
  EXPECT_DOUBLE_EQ(decode.parts[1].bf16_flops, 61 * (2 * 128 * 2048.0 * (576 + 512) + 2 * kv_b));
}

// One rank's work of DeepSeek-V3 under expert parallelism over 16, against a sheet computed apart.
TEST(RooflineTest, Shard16) {
  const ModelConfig m = Load("deploy/configs/shard16.json");
  EXPECT_NEAR(Milliseconds(m, Plan(1, 2047, 1), kH100Peak), 11.5, 0.15);
  EXPECT_NEAR(Milliseconds(m, Plan(8, 2047, 1), kH100Peak), 17.8, 0.15);
  EXPECT_NEAR(Milliseconds(m, Plan(32, 1800, 1), kH100Peak), 18.9, 0.15);
  EXPECT_NEAR(Milliseconds(m, Plan(64, 2047, 1), kH100Peak), 20.4, 0.15);
  EXPECT_NEAR(Milliseconds(m, Plan(8, 2047, 1), kH100Reached), 25, 0.3);
  // Prefill: 41.2 us a token at peak rates, 16 prompts of 2,048.
  EXPECT_NEAR(Milliseconds(m, Plan(16, 0, 2048), kH100Peak), 16 * 2048 * 41.2e-3, 40);
}

TEST(RooflineTest, ExpertsHit) {
  EXPECT_EQ(ExpectedExperts(0, 8, 5), 0);
  EXPECT_DOUBLE_EQ(ExpectedExperts(16, 8, 1), 8);
  EXPECT_DOUBLE_EQ(ExpectedExperts(256, 8, 1), 8);
  EXPECT_NEAR(ExpectedExperts(16, 8, 64), 16, 1e-9);
  EXPECT_DOUBLE_EQ(ExpectedExperts(4, 4, 1), 4);
}

}  // namespace
}  // namespace latentd
