#include "server/bench/request_trace.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "scheduler/scheduler.h"
#include "server/client/summary.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

constexpr EngineInfo kEngine = {.num_blocks = 3000, .max_model_len = 160000, .vocab_size = 129280};

RequestTrace Make(const TraceOptions& options) {
  auto trace = RequestTrace::Make(options, kEngine);
  EXPECT_TRUE(trace.ok()) << trace.status();
  return *std::move(trace);
}

// Mean median * exp(sigma^2 / 2), quantiles median * exp(z sigma): 161 and 338 as in ShareGPT.
TEST(RequestTraceTest, MomentsOfTheDefaults) {
  const RequestTrace trace = Make({});
  std::vector<float> prompt, output;
  for (int i = 0; i < 100000; ++i) {
    const auto [p, o] = trace.LengthsOf(i);
    prompt.push_back(static_cast<float>(p));
    output.push_back(static_cast<float>(o));
  }
  const Summary p = Summarize(&prompt), o = Summarize(&output);
  EXPECT_NEAR(p.mean, 161, 4);
  EXPECT_NEAR(o.mean, 338, 4);
  EXPECT_NEAR(p.p50, 76, 1.5);
  EXPECT_NEAR(p.p90, 76 * std::exp(1.2816 * 1.23), 8);
  EXPECT_NEAR(p.p99, 76 * std::exp(2.3263 * 1.23), 60);
  EXPECT_NEAR(o.p50, 230, 3);
  EXPECT_NEAR(o.p90, 230 * std::exp(1.2816 * 0.88), 12);
  EXPECT_NEAR(o.p99, 230 * std::exp(2.3263 * 0.88), 60);
  EXPECT_GE(p.min, 1);
  EXPECT_GE(o.min, 1);
}

TEST(RequestTraceTest, ARequestIsAFunctionOfSeedAndIndex) {
  const RequestTrace a = Make({.seed = 7}), b = Make({.seed = 7}), other = Make({.seed = 8});
  int different = 0;
  for (int64_t i : {0, 1, 2, 1000, 999999}) {
    const Request x = a.At(i), y = b.At(i);
    EXPECT_EQ(x.prompt, y.prompt);
    EXPECT_EQ(x.max_new_tokens, y.max_new_tokens);
    EXPECT_EQ(x.id, static_cast<RequestId>(i + 1));
    const auto [prompt, output] = a.LengthsOf(i);
    EXPECT_EQ(static_cast<int32_t>(x.prompt.size()), prompt);
    EXPECT_EQ(x.max_new_tokens, output);
    different += other.At(i).prompt != x.prompt;
  }
  EXPECT_EQ(different, 5);
}

TEST(RequestTraceTest, NoPromptBeginsAsAnotherDoes) {
  const RequestTrace trace = Make({.prompt_tokens = "64", .output_tokens = "1"});
  std::set<std::vector<TokenId>> prompts;
  for (int i = 0; i < 2000; ++i) prompts.insert(trace.At(i).prompt);
  EXPECT_EQ(prompts.size(), 2000u);
}

TEST(RequestTraceTest, RequestsFitTheEngine) {
  EngineInfo small = kEngine;
  small.max_model_len = 300;
  const auto trace = RequestTrace::Make({}, small);
  ASSERT_TRUE(trace.ok());
  for (int i = 0; i < 5000; ++i) {
    const auto [prompt, output] = trace->LengthsOf(i);
    EXPECT_LE(prompt + output, 300);
    EXPECT_TRUE(CheckRequest(trace->At(i), small).ok());
  }
}

TEST(RequestTraceTest, WhatCannotBeIsRefusedByName) {
  const auto message = [](const TraceOptions& options) {
    const auto trace = RequestTrace::Make(options, kEngine);
    EXPECT_EQ(trace.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(trace.status().message());
  };
  EXPECT_THAT(message({.prompt_tokens = "many"}), HasSubstr("--prompt-tokens is 'many'"));
  EXPECT_THAT(message({.output_tokens = "0"}), HasSubstr("--output-tokens is '0'"));
  EXPECT_THAT(message({.prompt_tokens = "150000", .output_tokens = "20000"}),
              HasSubstr("need up to 170000 tokens; a rank's cache or the model takes 160000"));
}

}  // namespace
}  // namespace latentd
