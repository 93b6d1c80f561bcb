#include "server/bench/cluster_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "server/bench/cluster_facts.h"
#include "tests/server/bench/model_files.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

struct Ran {
  absl::Status status;
  std::vector<nlohmann::json> lines;
  std::string err;
};

// Parses the flags as the program does.
Ran RunBench(std::vector<std::string> flags) {
  ClusterBenchOptions options;
  CLI::App app;
  AddClusterBenchOptions(app, &options);
  std::reverse(flags.begin(), flags.end());
  app.parse(flags);
  Ran ran;
  ran.status = FinishClusterBenchOptions(&options);
  if (!ran.status.ok()) return ran;
  std::ostringstream out, err;
  ran.status = RunClusterBench(DeepSeekV3(), options, out, err);
  ran.err = err.str();
  std::istringstream lines(out.str());
  for (std::string line; std::getline(lines, line);) {
    ran.lines.push_back(nlohmann::json::parse(line));
  }
  return ran;
}

TEST(ClusterBenchTest, LinesAndTable) {
  const Ran ran = RunBench({"--request-rate", "5", "10", "--concurrency", "16", "--warmup", "2",
                            "--duration", "4", "--gpu-price", "3.6"});
  ASSERT_TRUE(ran.status.ok()) << ran.status;
  // Basis, trace, and four clusters with three loads each.
  ASSERT_EQ(ran.lines.size(), 2u + 4 * 4);
  EXPECT_EQ(ran.lines[0]["name"], "basis");
  EXPECT_EQ(ran.lines[1]["name"], "trace");
  EXPECT_NEAR(ran.lines[1]["prompt"]["mean"], 161, 5);
  const auto& cluster = ran.lines[2];
  EXPECT_EQ(cluster["name"], "cluster");
  EXPECT_EQ(cluster["scenario"], "EP16");
  EXPECT_EQ(cluster["gpus"], 16);
  const auto& load = ran.lines[3];
  EXPECT_EQ(load["name"], "load");
  EXPECT_EQ(load["request_rate"], 5);
  EXPECT_FALSE(load.contains("concurrency"));
  const double tok_s = load["output_tok_s"], dollars = load["dollars_per_million_output"];
  // 16 GPUs at 3.6 dollars an hour are 0.016 dollars a second.
  EXPECT_NEAR(dollars, 0.016 / tok_s * 1e6, 0.002 * dollars);
  EXPECT_EQ(ran.lines[5]["concurrency"], 16);
  EXPECT_EQ(ran.lines[6]["scenario"], "EP32");
  EXPECT_EQ(ran.lines[7]["request_rate"], 10);  // twice the nodes, twice the load
  EXPECT_EQ(ran.lines[9]["concurrency"], 32);
  EXPECT_EQ(ran.lines[10]["scenario"], "EP16, FP8 cache");
  EXPECT_EQ(ran.lines[14]["scenario"], "EP16, MTP");
  EXPECT_EQ(ran.lines[14]["mtp_acceptance"], 0.85);
  EXPECT_THAT(ran.err, HasSubstr("EP16: 2 nodes of 8 H100"));
  EXPECT_THAT(ran.err, HasSubstr("conc 16"));
  EXPECT_THAT(ran.err, HasSubstr("$/M out"));
}

TEST(ClusterBenchTest, SaysWhatIsMeasuredAndWhatIsAssumed) {
  const Ran ran =
      RunBench({"--request-rate", "2", "--what-if", "none", "--warmup", "0", "--duration", "1"});
  ASSERT_TRUE(ran.status.ok()) << ran.status;
  int measured = 0, published = 0, assumed = 0;
  for (const auto& fact : ran.lines[0]["facts"]) {
    measured += fact["origin"] == "measured";
    published += fact["origin"] == "published";
    assumed += fact["origin"] == "assumed";
    EXPECT_NE(fact["what"], "MTP");  // no scenario has it
  }
  EXPECT_GE(measured, 4);
  EXPECT_GE(published, 2);
  EXPECT_GE(assumed, 4);
  EXPECT_THAT(ran.err, HasSubstr("measured   decode step of one rank: 16.5, 24.8"));
  ClusterBenchOptions options;
  CLI::App app;
  AddClusterBenchOptions(app, &options);
  for (const char* words : {"measured   decode step", "assumed    MTP", "measured   FP8 cache",
                            "published  InfiniBand"}) {
    EXPECT_THAT(app.help(), HasSubstr(words));
  }
}

TEST(ClusterBenchTest, FlagsReachTheModel) {
  const Ran ran = RunBench({"--request-rate", "2", "--what-if", "even", "rails", "--nodes", "3",
                            "--infiniband", "25", "--nvlink", "200", "--max-running", "100",
                            "--fp8-cache", "--quiet", "--warmup", "0", "--duration", "1"});
  ASSERT_TRUE(ran.status.ok()) << ran.status;
  EXPECT_EQ(ran.err, "");
  EXPECT_EQ(ran.lines[2]["scenario"], "EP24, FP8 cache");
  EXPECT_EQ(ran.lines[2]["max_running"], 100);
  EXPECT_EQ(ran.lines[4]["imbalance"], 1);
  EXPECT_EQ(ran.lines[6]["exchange"], "rails");
  bool infiniband = false;
  for (const auto& fact : ran.lines[0]["facts"]) {
    infiniband |= fact["value"] == "25 GB/s a GPU and direction";
  }
  EXPECT_TRUE(infiniband);
}

TEST(ClusterBenchTest, WhatMakesNoSenseIsRefusedByName) {
  const auto message = [](std::vector<std::string> flags) {
    const Ran ran = RunBench(std::move(flags));
    EXPECT_EQ(ran.status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_TRUE(ran.lines.empty() || ran.lines.back()["name"] != "load");
    return std::string(ran.status.message());
  };
  EXPECT_THAT(message({"--request-rate", "0"}), HasSubstr("--request-rate is 0"));
  EXPECT_THAT(message({"--concurrency", "0"}), HasSubstr("--concurrency is 0"));
  EXPECT_THAT(message({"--duration", "0"}), HasSubstr("--duration is 0"));
  EXPECT_THAT(message({"--warmup", "-1"}), HasSubstr("--warmup is -1"));
  EXPECT_THAT(message({"--ttft-slo", "0"}), HasSubstr("--ttft-slo is 0"));
  EXPECT_THAT(message({"--tpot-slo", "nan"}), HasSubstr("--tpot-slo is nan"));
  EXPECT_THAT(message({"--gpu-price", "-2"}), HasSubstr("--gpu-price is -2"));
  EXPECT_THAT(message({"--what-if-acceptance", "2"}), HasSubstr("--what-if-acceptance is 2"));
  EXPECT_THAT(message({"--what-if", "fp4"}),
              HasSubstr("--what-if is 'fp4'; known are: nodes, fp8-cache, mtp, rails, even, none"));
  EXPECT_THAT(message({"--what-if", "none", "mtp"}), HasSubstr("excludes the others"));
  EXPECT_THAT(message({"--prompt-tokens", "x"}), HasSubstr("--prompt-tokens is 'x'"));
  EXPECT_THAT(message({"--nodes", "0"}), HasSubstr("EP0: --nodes is 0"));
}

TEST(ClusterBenchTest, AClusterThatIsTooSmallSaysWhy) {
  const Ran ran = RunBench({"--nodes", "1", "--request-rate", "1"});
  EXPECT_EQ(ran.status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(ran.status.message()), HasSubstr("EP8: a rank of 8 does not fit"));
}

TEST(ClusterFactsTest, LinesKeepTheirWidth) {
  const std::string text = FormatFacts(
      {{Fact::Origin::kMeasured, "a", "one two three four five six seven", "here"}}, 30);
  EXPECT_EQ(text,
            "measured   a: one two three\n"
            "           four five six seven\n"
            "           (here)\n");
}

}  // namespace
}  // namespace latentd
