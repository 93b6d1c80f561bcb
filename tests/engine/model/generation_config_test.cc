#include "engine/model/generation_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {
namespace {

using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

constexpr int32_t kVocabSize = 1000;

TEST(GenerationConfigTest, DemoModel) {
  const auto config = LoadGenerationConfig("deploy/demo-model", 4096);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->temperature, 0.6f);
  EXPECT_EQ(config->top_p, 0.95f);
  EXPECT_EQ(config->top_k, std::nullopt);
  EXPECT_EQ(config->min_p, std::nullopt);
  EXPECT_EQ(config->bos_token_id, 0);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1));
  EXPECT_TRUE(config->unknown_fields.empty());
}

TEST(GenerationConfigTest, EveryField) {
  const auto config = ParseGenerationConfig(
      R"({"temperature": 0.7, "top_p": 1, "top_k": 50, "min_p": 0.1, "repetition_penalty": 1.1,
          "max_new_tokens": 2048, "min_new_tokens": 1, "eos_token_id": [1, 2], "do_sample": true,
          "num_beams": 1, "penalty_alpha": null, "transformers_version": "5.0", "colour": "red"})",
      kVocabSize);
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->temperature, 0.7f);
  EXPECT_EQ(config->top_p, 1.0f);
  EXPECT_EQ(config->top_k, 50);
  EXPECT_EQ(config->min_p, 0.1f);
  EXPECT_EQ(config->repetition_penalty, 1.1f);
  EXPECT_EQ(config->max_new_tokens, 2048);
  EXPECT_EQ(config->min_new_tokens, 1);
  EXPECT_THAT(config->eos_token_ids, ElementsAre(1, 2));
  EXPECT_THAT(config->unknown_fields, ElementsAre("colour"));
}

TEST(GenerationConfigTest, NotSamplingIsTemperatureZero) {
  EXPECT_EQ(
      ParseGenerationConfig(R"({"do_sample": false, "temperature": 0.6})", kVocabSize)->temperature,
      0.0f);
  EXPECT_EQ(ParseGenerationConfig(R"({"temperature": 0.6})", kVocabSize)->temperature, 0.6f);
  EXPECT_EQ(ParseGenerationConfig(R"({"temperature": null})", kVocabSize)->temperature,
            std::nullopt);
}

TEST(GenerationConfigTest, TopKMinusOneAndZeroAreNoLimit) {
  EXPECT_EQ(ParseGenerationConfig(R"({"top_k": -1})", kVocabSize)->top_k, 0);
  EXPECT_EQ(ParseGenerationConfig(R"({"top_k": 0})", kVocabSize)->top_k, 0);
}

TEST(GenerationConfigTest, RefusedByName) {
  const std::pair<const char*, const char*> refusals[] = {
      {R"({"temperature": -0.1})", "temperature is -0.1; must be a number in [0, 2]"},
      {R"({"temperature": 2.5})", "temperature is 2.5"},
      {R"({"temperature": "hot"})", "temperature is \"hot\""},
      {R"({"top_p": 0})", "top_p is 0"},
      {R"({"top_p": 1.01})", "top_p is 1.01"},
      {R"({"top_k": -2})", "top_k is -2"},
      {R"({"top_k": 1.5})", "top_k is 1.5"},
      {R"({"min_p": 1.5})", "min_p is 1.5"},
      {R"({"repetition_penalty": 0})", "repetition_penalty is 0"},
      {R"({"max_new_tokens": 0})", "max_new_tokens is 0"},
      {R"({"min_new_tokens": -1})", "min_new_tokens is -1"},
      {R"({"eos_token_id": 1000})", "eos_token_id is 1000; must be an integer in [0, 999]"},
      {R"({"bos_token_id": -1})", "bos_token_id is -1"},
      {R"({"do_sample": 1})", "do_sample is 1; must be true or false"},
      {R"({"num_beams": 4})", "num_beams is 4; must be 1"},
      {R"({"no_repeat_ngram_size": 3})", "no_repeat_ngram_size is 3; must be 0"},
      {R"({"suppress_tokens": [1]})", "suppress_tokens is [1]; must be null"},
      {R"({"temperature": 1, "temperature": 2})", "'temperature' occurs twice"},
      {"[1]", "must be a JSON object"},
      {"{", "parse error"},
  };
  for (const auto& [json, message] : refusals) {
    const auto config = ParseGenerationConfig(json, kVocabSize);
    ASSERT_FALSE(config.ok()) << json;
    EXPECT_THAT(std::string(config.status().message()),
                AllOf(HasSubstr("generation_config.json: "), HasSubstr(message)));
  }
}

TEST(GenerationConfigTest, Files) {
  TempDir dir;
  const auto none = LoadGenerationConfig(dir.path(), kVocabSize);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->temperature, std::nullopt);
  WriteAll(dir.path() / "generation_config.json", R"({"top_p": 3})");
  const auto bad = LoadGenerationConfig(dir.path(), kVocabSize);
  EXPECT_THAT(std::string(bad.status().message()), HasSubstr(dir.path().string()));
}

}  // namespace
}  // namespace latentd
