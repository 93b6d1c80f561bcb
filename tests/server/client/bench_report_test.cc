#include "server/client/bench_report.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace latentd {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::Not;

TEST(SummaryTest, QuantilesAreNumpys) {
  // numpy.percentile([15, 20, 35, 40, 50], [0, 40, 50, 90, 99, 100])
  const std::vector<float> sorted = {15, 20, 35, 40, 50};
  EXPECT_DOUBLE_EQ(Quantile(sorted, 0), 15);
  EXPECT_DOUBLE_EQ(Quantile(sorted, 0.4), 29);
  EXPECT_DOUBLE_EQ(Quantile(sorted, 0.5), 35);
  EXPECT_DOUBLE_EQ(Quantile(sorted, 0.9), 46);
  EXPECT_NEAR(Quantile(sorted, 0.99), 49.6, 1e-9);
  EXPECT_DOUBLE_EQ(Quantile(sorted, 1), 50);
  EXPECT_DOUBLE_EQ(Quantile({7}, 0.99), 7);
}

TEST(SummaryTest, OfUnsortedSamples) {
  std::vector<float> samples;
  for (int i = 0; i < 1001; ++i) samples.push_back(static_cast<float>((i * 577) % 1001));
  const Summary summary = Summarize(&samples);
  EXPECT_EQ(summary.count, 1001);
  EXPECT_DOUBLE_EQ(summary.mean, 500);
  EXPECT_DOUBLE_EQ(summary.min, 0);
  EXPECT_DOUBLE_EQ(summary.p50, 500);
  EXPECT_DOUBLE_EQ(summary.p90, 900);
  EXPECT_DOUBLE_EQ(summary.p99, 990);
  EXPECT_DOUBLE_EQ(summary.max, 1000);
}

TEST(SummaryTest, MeanOfManySamplesLosesNothing) {
  // A float accumulator would stall at 2^24.
  std::vector<float> samples(20'000'000, 1.0f);
  EXPECT_DOUBLE_EQ(Summarize(&samples).mean, 1);
}

TEST(SummaryTest, OfNothing) {
  std::vector<float> samples;
  EXPECT_EQ(Summarize(&samples).count, 0);
}

class ReportTest : public testing::Test {
 protected:
  ReportTest() {
    model_.set_name("demo");
    model_.set_vocab_size(4096);
    result_.num_sent = 10;
    result_.num_completed = 7;
    result_.num_cancelled = 1;
    result_.num_short = 1;
    result_.errors = {{"UNAVAILABLE", {2, "UNAVAILABLE: draining"}}};
    result_.prompt_tokens = 700;
    result_.cached_tokens = 64;
    result_.completion_tokens = 350;
    result_.num_deltas = 300;
    result_.num_single_token_deltas = 270;
    result_.num_counted_tokens = 360;
    result_.max_in_flight = 4;
    result_.duration_s = 2;
    result_.user_cpu_s = 0.25;
    result_.system_cpu_s = 0.25;
    result_.ttft_ms = {3, 1, 2};
    result_.e2e_ms = {10, 20};
    result_.send_lag_ms = {0.5};
  }
  json Report(bool interrupted = false) {
    return MakeReport(options_, model_, "2026-01-02T03:04:05Z", interrupted, &result_);
  }

  BenchOptions options_;
  v1::Model model_;
  LoadResult result_;
};

TEST_F(ReportTest, HoldsWhatWasMeasured) {
  const json report = Report();
  EXPECT_EQ(report["schema_version"], 1);
  EXPECT_EQ(report["started_at"], "2026-01-02T03:04:05Z");
  EXPECT_EQ(report["model"]["name"], "demo");
  EXPECT_EQ(report["interrupted"], false);
  EXPECT_EQ(report["requests"], json::parse(R"({"sent": 10, "completed": 7, "failed": 2,
      "cancelled": 1, "short": 1, "max_in_flight": 4, "error_rate": 0.2})"));
  EXPECT_EQ(report["errors"],
            json::parse(R"({"UNAVAILABLE": {"count": 2, "message": "UNAVAILABLE: draining"}})"));
  EXPECT_EQ(report["tokens"],
            json::parse(R"({"prompt": 700, "cached": 64, "completion": 350, "reasoning": 0})"));
  EXPECT_EQ(report["throughput"], json::parse(R"({"requests_per_s": 3.5,
      "prompt_tokens_per_s": 350.0, "completion_tokens_per_s": 175.0})"));
  EXPECT_EQ(report["latency_ms"]["ttft"], json::parse(R"({"count": 3, "mean": 2.0, "min": 1.0,
      "p50": 2.0, "p90": 2.8, "p99": 2.98, "max": 3.0})"));
  EXPECT_EQ(report["latency_ms"]["itl"], json::parse(R"({"count": 0})"));
  EXPECT_EQ(report["latency_ms"]["e2e"]["p50"], 15.0);
  EXPECT_EQ(report["latency_ms"]["send_lag"]["max"], 0.5);
  EXPECT_EQ(report["deltas"], json::parse(R"({"count": 300, "tokens_per_delta": 1.2,
      "single_token_share": 0.9})"));
  EXPECT_EQ(report["client"], json::parse(R"({"cpu_s": 0.5, "user_cpu_s": 0.25,
      "system_cpu_s": 0.25, "deltas_per_cpu_s": 600.0})"));
}

TEST_F(ReportTest, EchoesTheConfiguration) {
  options_.concurrency = 8;
  options_.temperature = 0.5f;
  const json config = Report()["config"];
  EXPECT_EQ(config["concurrency"], 8);
  EXPECT_EQ(config["temperature"], 0.5);
  EXPECT_EQ(config["prompt_tokens"], "256");
  options_.prompts = "chats.jsonl";
  options_.temperature.reset();
  EXPECT_FALSE(Report()["config"].contains("prompt_tokens"));
  EXPECT_TRUE(Report()["config"]["temperature"].is_null());
}

TEST_F(ReportTest, SaysNullWhereItDoesNotKnow) {
  options_.token_ids = false;
  EXPECT_TRUE(Report()["deltas"]["single_token_share"].is_null());
  options_.token_ids = true;
  result_ = LoadResult();
  const json empty = Report();
  EXPECT_TRUE(empty["deltas"]["tokens_per_delta"].is_null());
  EXPECT_TRUE(empty["client"]["deltas_per_cpu_s"].is_null());
  EXPECT_EQ(empty["throughput"]["requests_per_s"], 0);
  EXPECT_EQ(empty["requests"]["error_rate"], 0);
}

TEST_F(ReportTest, TableShowsTheSame) {
  const std::string table = FormatReport(Report());
  EXPECT_THAT(table, HasSubstr("10 requests in 2.00 s: 7 completed, 2 failed, 1 cancelled"));
  EXPECT_THAT(table, HasSubstr("2 x UNAVAILABLE: draining"));
  EXPECT_THAT(table, HasSubstr("175.0 completion tokens/s"));
  EXPECT_THAT(table, HasSubstr("ttft                3       2.00       2.00       2.80"));
  EXPECT_THAT(table, Not(HasSubstr("itl")));
  EXPECT_THAT(table, HasSubstr("300 deltas, 1.20 tokens each, 90.0 % with exactly one"));
  EXPECT_THAT(table, HasSubstr("client CPU 0.50 s, 600 deltas per CPU second"));
}

}  // namespace
}  // namespace latentd
