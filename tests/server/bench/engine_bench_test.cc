#include "server/bench/engine_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

namespace latentd {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kModel[] = "tests/golden/variants/base";

struct Ran {
  absl::Status status;
  std::vector<nlohmann::json> lines;
  std::string err;
};

Ran RunBench(const EngineBenchOptions& options,
             EngineSettings settings = {.num_blocks = 64,
                                        .max_step_tokens = 32,
                                        .max_sequences = 8,
                                        .threads = 1},
             LoadFormat format = LoadFormat::kSafetensors) {
  const auto model = LoadModelConfig(kModel);
  EXPECT_TRUE(model.ok()) << model.status();
  std::ostringstream out, err;
  Ran ran;
  ran.status = RunEngineBench(*model, kModel, format, settings, options, out, err);
  ran.err = err.str();
  std::istringstream lines(out.str());
  for (std::string line; std::getline(lines, line);) {
    ran.lines.push_back(nlohmann::json::parse(line));
  }
  return ran;
}

TEST(EngineBenchTest, OneObjectForEachScenario) {
  const Ran ran = RunBench({.decode = {{1, 50}, {4, 20}},
                            .prefill = {{3, 70}},
                            .steps = 10,
                            .warmup_steps = 2,
                            .repeats = 2});
  ASSERT_TRUE(ran.status.ok()) << ran.status;
  ASSERT_EQ(ran.lines.size(), 4u);

  const auto& start = ran.lines[0];
  EXPECT_EQ(start["name"], "start");
  EXPECT_EQ(start["engine"], "cpu");
  EXPECT_EQ(start["kv_cache_tokens"], 64 * 64);
  EXPECT_GT(start["load_seconds"], 0);
  EXPECT_GE(start["start_seconds"], start["load_seconds"]);

  const auto& prefill = ran.lines[1];
  EXPECT_EQ(prefill["name"], "prefill 3:70");
  EXPECT_EQ(prefill["prompts"], 3);
  EXPECT_EQ(prefill["tokens"], 70);
  EXPECT_EQ(prefill["repeats"], 2);
  EXPECT_EQ(prefill["steps"], 7);  // 210 tokens, 32 a step
  const double ms = prefill["ms"], tok_s = prefill["tok_s"];
  EXPECT_NEAR(tok_s * ms, 210 * 1e3, 500);

  for (const auto& [line, batch, context] :
       {std::tuple(ran.lines[2], 1, 50), {ran.lines[3], 4, 20}}) {
    EXPECT_EQ(line["name"], "decode " + std::to_string(batch) + ":" + std::to_string(context));
    EXPECT_EQ(line["batch"], batch);
    EXPECT_EQ(line["context"], context);
    EXPECT_EQ(line["steps"], 10);
    EXPECT_EQ(line["synthetic_context"], false);
    const double median = line["ms_per_step"]["median"], rate = line["tok_s"];
    EXPECT_GT(median, 0);
    EXPECT_LE(line["ms_per_step"]["p10"], line["ms_per_step"]["median"]);
    EXPECT_LE(line["ms_per_step"]["median"], line["ms_per_step"]["p90"]);
    EXPECT_NEAR(rate * median, batch * 1e3, batch * 2.0);
    // The roofline is a GPU's, and the CPU engine tells no times of a device or of kernels.
    EXPECT_FALSE(line.contains("roofline_ms"));
    EXPECT_FALSE(line.contains("gpu_idle_ms"));
    EXPECT_FALSE(line.contains("families"));
  }
  EXPECT_THAT(ran.err, HasSubstr("all weights"));  // the plan
  EXPECT_THAT(ran.err, HasSubstr("loading: 100 %"));
}

TEST(EngineBenchTest, ContextsAreComputedOnceOrBlockByBlock) {
  const Ran computed = RunBench({.decode = {{2, 60}, {2, 40}}, .steps = 4, .warmup_steps = 1});
  ASSERT_TRUE(computed.status.ok()) << computed.status;
  EXPECT_THAT(computed.err, HasSubstr("computing 2 contexts of 56 tokens"));
  EXPECT_THAT(computed.err, Not(HasSubstr("contexts of 36")));
  const Ran by_block = RunBench(
      {.decode = {{2, 60}, {3, 200}}, .steps = 4, .warmup_steps = 1, .synthetic_context = true});
  ASSERT_TRUE(by_block.status.ok()) << by_block.status;
  EXPECT_THAT(by_block.err, HasSubstr("computing 2 contexts of 56 tokens, block by block"));
  EXPECT_EQ(by_block.lines[1]["synthetic_context"], true);
}

TEST(EngineBenchTest, OneStepWillDo) {
  const Ran ran = RunBench({.decode = {{1, 1}}, .steps = 1, .warmup_steps = 0});
  ASSERT_TRUE(ran.status.ok()) << ran.status;
  EXPECT_EQ(ran.lines[1]["steps"], 1);
  EXPECT_GT(ran.lines[1]["tok_s"], 0);
}

TEST(EngineBenchTest, RandomWeightsDo) {
  const Ran ran =
      RunBench({.prefill = {{1, 5}}, .repeats = 1},
               {.num_blocks = 1, .max_step_tokens = 8, .max_sequences = 1}, LoadFormat::kDummy);
  EXPECT_TRUE(ran.status.ok()) << ran.status;
}

TEST(EngineBenchTest, WhatDoesNotFitIsRefusedByName) {
  const auto message = [](const Ran& ran) { return std::string(ran.status.message()); };
  EXPECT_THAT(message(RunBench({})), HasSubstr("--table"));
  EXPECT_THAT(message(RunBench({.decode = {{1, 10}}, .steps = 0})), HasSubstr("--steps is 0"));
  EXPECT_THAT(message(RunBench({.decode = {{1, 10}}, .warmup_steps = -1})),
              HasSubstr("--warmup-steps is -1"));
  EXPECT_THAT(message(RunBench({.prefill = {{1, 10}}, .repeats = 0})), HasSubstr("--repeats is 0"));
  EXPECT_THAT(message(RunBench({.decode = {{9, 10}}})),
              HasSubstr("--decode 9:10: the engine takes 8 sequences"));
  EXPECT_THAT(message(RunBench({.prefill = {{70, 50}}})),
              HasSubstr("--prefill 70:50: the scenarios so far need 70 blocks"));
  const Ran long_prompt = RunBench({.prefill = {{1, 100000}}});
  EXPECT_THAT(message(long_prompt), HasSubstr("--prefill 1:100000: sequences reach 100000 tokens"));
  EXPECT_THAT(long_prompt.lines, IsEmpty());
}

TEST(EngineBenchTest, CountAndLength) {
  const auto good = ParseCountAndLength("--decode", "8:2048");
  ASSERT_TRUE(good.ok());
  EXPECT_EQ(good->count, 8);
  EXPECT_EQ(good->length, 2048);
  for (const char* text :
       {"", "8", "8:", ":8", "0:5", "5:0", "-1:5", "1:2:3", "a:b", "1:99999999"}) {
    const auto bad = ParseCountAndLength("--decode", text);
    EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument) << text;
    EXPECT_THAT(std::string(bad.status().message()),
                HasSubstr("--decode is '" + std::string(text) + "'"));
  }
}

}  // namespace
}  // namespace latentd
