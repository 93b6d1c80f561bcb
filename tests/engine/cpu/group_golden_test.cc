// Groups of CPU ranks against Hugging Face Transformers in fp32: the demo model's goldens hold for
// every number of ranks.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "nlohmann/json.hpp"
#include "tests/engine/cpu/group_harness.h"

namespace latentd {
namespace {

constexpr char kGolden[] = "tests/golden/model";
constexpr int kTop = 20;  // logits of each row of logits.safetensors

nlohmann::json ReadJson(const std::filesystem::path& file) {
  return nlohmann::json::parse(std::ifstream(file));
}

struct Prompt {
  std::string id;
  std::vector<TokenId> tokens;
};

// Those of at most this many tokens; LATENTD_TEST_LONG=1: of up to 3,000.
std::vector<Prompt> Prompts(size_t most_tokens) {
  if (std::getenv("LATENTD_TEST_LONG") != nullptr) most_tokens = 3000;
  std::vector<Prompt> prompts;
  for (const auto& prompt : ReadJson(std::filesystem::path(kGolden) / "prompts.json")) {
    if (prompt["ids"].size() <= most_tokens) prompts.push_back({prompt["id"], prompt["ids"]});
  }
  return prompts;
}

class GroupGoldenTest : public ::testing::TestWithParam<int> {
 protected:
  GroupGoldenTest()
      : group_(LoadModel(kDemoModel), GetParam(),
               {.runner = {.num_threads = 1, .num_blocks = 64, .max_step_tokens = 3000}}) {}

  const std::filesystem::path dir_ = std::filesystem::path(kGolden) / "fp8";
  GroupRunner group_;
};

TEST_P(GroupGoldenTest, GreedyContinuationsAreTransformers) {
  constexpr TokenId kEos = 1;
  const auto greedy = ReadJson(dir_ / "greedy.json");
  std::vector<LoadItem> load;
  std::vector<Prompt> prompts = Prompts(200);
  for (const Prompt& prompt : prompts) {
    LoadItem& item = load.emplace_back();
    item.request.id = load.size();
    item.request.prompt = prompt.tokens;
    item.request.max_new_tokens = 64;
    item.request.stop_token_ids = {kEos};
    item.request.sampling.temperature = 0;
    item.arrival = static_cast<int>(load.size());
  }
  ASSERT_GE(prompts.size(), 18u);
  const LoadReport report = RunLoad(load, {.max_step_tokens = 256}, &group_);
  for (size_t i = 0; i < prompts.size(); ++i) {
    EXPECT_EQ(report.tokens.at(i + 1), greedy[prompts[i].id]["tokens"].get<std::vector<TokenId>>())
        << prompts[i].id;
  }
}

TEST_P(GroupGoldenTest, TopLogitsAreTransformers) {
  const auto golden = OpenGolden(dir_ / "logits.safetensors");
  // All prompts in one step, dealt out to the ranks.
  std::vector<Prompt> prompts = Prompts(200);
  std::erase_if(prompts, [&](const Prompt& prompt) {
    return golden->Find(prompt.id + "/top_ids") == nullptr;
  });
  ASSERT_GE(prompts.size(), 6u);
  std::vector<Runner::Part> parts;
  std::vector<BlockId> next(GetParam(), 0);
  for (size_t i = 0; i < prompts.size(); ++i) {
    BlockId& first = next[i % GetParam()];
    parts.push_back({.tokens = prompts[i].tokens,
                     .num_computed = 0,
                     .blocks = ConsecutiveBlocks(prompts[i].tokens.size(), first)});
    first += static_cast<BlockId>(parts.back().blocks.size());
  }
  StepPlan plan = Runner::MakePlan(parts);
  for (size_t i = 0; i < parts.size(); ++i) plan.sequences[i].dp_rank = i % GetParam();
  const std::vector<float> logits = group_.Step(plan);

  const size_t vocab = group_.info().vocab_size;
  size_t end = 0;  // of a prompt's rows
  for (const Prompt& prompt : prompts) {
    SCOPED_TRACE(prompt.id);
    end += prompt.tokens.size();
    const std::vector<int32_t> top_ids = GoldenInts(*golden, prompt.id + "/top_ids");
    const std::vector<float> top_logits = GoldenFloats(*golden, prompt.id + "/top_logits");
    const size_t first = end - top_ids.size() / kTop;
    for (size_t i = 0; i < top_ids.size(); ++i) {
      ASSERT_NEAR(logits[(first + i / kTop) * vocab + top_ids[i]], top_logits[i], 2e-3);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Ranks, GroupGoldenTest, ::testing::Values(1, 2, 4, 8, 16));

}  // namespace
}  // namespace latentd
