#include "server/bench/cluster_run.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "server/bench/simulated_engine.h"
#include "tests/server/bench/model_files.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

// Short enough for a test: half a minute of a cluster takes a fraction of a second.
constexpr ClusterRunOptions kShort = {.warmup_s = 10, .duration_s = 20};

ClusterModel Make(const ClusterModelOptions& options = {}) {
  auto cluster = ClusterModel::Make(DeepSeekV3(), options);
  EXPECT_TRUE(cluster.ok()) << cluster.status();
  return *std::move(cluster);
}

ClusterResult RunLoad(const ClusterModel& model, const ClusterLoad& load,
                      const TraceOptions& trace_options = {},
                      const ClusterRunOptions& options = kShort) {
  const auto trace = RequestTrace::Make(trace_options, model.info());
  EXPECT_TRUE(trace.ok()) << trace.status();
  auto result = RunCluster(model, *trace, load, trace_options.seed, options);
  EXPECT_TRUE(result.ok()) << result.status();
  return *std::move(result);
}

TEST(ClusterRunTest, TheSameSeedGivesTheSameRun) {
  const ClusterModel model = Make();
  const ClusterResult a = RunLoad(model, {.request_rate = 15});
  const ClusterResult b = RunLoad(model, {.request_rate = 15});
  const ClusterResult other = RunLoad(model, {.request_rate = 15}, {.seed = 1});
  EXPECT_EQ(a.requests, b.requests);
  EXPECT_EQ(a.steps, b.steps);
  EXPECT_EQ(a.output_tokens_per_s, b.output_tokens_per_s);
  EXPECT_EQ(a.ttft_ms.p99, b.ttft_ms.p99);
  EXPECT_EQ(a.itl_ms.p50, b.itl_ms.p50);
  EXPECT_EQ(a.cache_mean, b.cache_mean);
  EXPECT_NE(a.ttft_ms.p99, other.ttft_ms.p99);
}

// One sequence at a time, each as long as the other: every number can be told in advance.
TEST(ClusterRunTest, OneRequestAtATime) {
  const ClusterModel model = Make();
  const ClusterResult r =
      RunLoad(model, {.concurrency = 1}, {.prompt_tokens = "1000", .output_tokens = "101"});
  StepPlan prompt, decode;
  prompt.sequences.push_back({.num_tokens = 1000, .sample = true});
  decode.sequences.push_back({.num_computed_tokens = 1050, .num_tokens = 1, .sample = true});
  const double prompt_s = model.Cost(prompt).seconds(), decode_s = model.Cost(decode).seconds();
  EXPECT_NEAR(r.ttft_ms.p50, 1e3 * prompt_s, 1e-3);
  EXPECT_NEAR(r.itl_ms.p50, 1e3 * decode_s, 0.01);
  EXPECT_NEAR(r.output_tokens_per_s, 101 / (prompt_s + 100 * decode_s), 1);
  EXPECT_NEAR(r.prompt_tokens_per_s, 1000 / (prompt_s + 100 * decode_s), 60);
  EXPECT_NEAR(r.sequences_per_rank, 1 / 16.0, 1e-9);
  EXPECT_NEAR(r.mixed_steps, 1 / 101.0, 0.002);
  EXPECT_NEAR(r.attention + r.experts + r.exchange + r.leader, 1, 1e-9);
  EXPECT_EQ(r.preemptions, 0);
  EXPECT_EQ(r.refused, 0);
  EXPECT_EQ(r.goodput_share, 1);
}

// Throughput follows the load until the cluster is full, and stays there.
TEST(ClusterRunTest, MoreLoadNeverRaisesWhatIsServedBeyondCapacity) {
  const ClusterModel model = Make({.max_sequences = 16});
  ClusterResult last;
  double capacity = 0;
  for (const double rate : {5.0, 10.0, 20.0, 60.0, 120.0}) {
    const ClusterResult r = RunLoad(model, {.request_rate = rate});
    EXPECT_GE(r.output_tokens_per_s, 0.95 * last.output_tokens_per_s) << rate;
    EXPECT_LE(r.goodput_per_s, r.arrivals_per_s) << rate;
    // What answers 338 tokens a request cannot answer more requests than that.
    EXPECT_LE(r.goodput_per_s, 1.4 * r.output_tokens_per_s / 338) << rate;
    EXPECT_GE(r.ttft_ms.p50, 0.9 * last.ttft_ms.p50) << rate;
    EXPECT_LE(r.sequences_per_rank, 16 + 1e-6) << rate;
    capacity = std::max(capacity, r.output_tokens_per_s);
    last = r;
  }
  EXPECT_NEAR(last.sequences_per_rank, 16, 0.1);  // full
  EXPECT_NEAR(last.output_tokens_per_s, capacity, 0.05 * capacity);
  EXPECT_LT(last.goodput_share, 0.3);  // most wait for too long
}

TEST(ClusterRunTest, LoadIsWhatWasAskedFor) {
  const ClusterModel model = Make();
  const ClusterResult r =
      RunLoad(model, {.request_rate = 30}, {}, {.warmup_s = 30, .duration_s = 60});
  EXPECT_NEAR(r.arrivals_per_s, 30, 3);
  EXPECT_NEAR(r.prompt_tokens_per_s, 30 * 161, 900);
  EXPECT_NEAR(r.output_tokens_per_s, 30 * 338, 1600);
  // Little's law: requests under way are their rate times how long one takes.
  EXPECT_NEAR(16 * r.sequences_per_rank, 30 * 338 * r.tpot_ms.mean / 1e3,
              0.3 * 16 * r.sequences_per_rank);
}

// A limit that is met to the letter is met: all requests are alike, alone, and take as long.
TEST(ClusterRunTest, EdgeOfTheSlo) {
  const ClusterModel model = Make();
  const TraceOptions alike = {.prompt_tokens = "500", .output_tokens = "1"};
  StepPlan prompt;
  prompt.sequences.push_back({.num_tokens = 500, .sample = true});
  const double ttft_s = model.Cost(prompt).seconds();
  ClusterRunOptions options = {.warmup_s = 1, .duration_s = 5};
  options.ttft_slo_s = ttft_s * 1.000001;
  EXPECT_EQ(RunLoad(model, {.concurrency = 1}, alike, options).goodput_share, 1);
  options.ttft_slo_s = ttft_s * 0.999999;
  EXPECT_EQ(RunLoad(model, {.concurrency = 1}, alike, options).goodput_share, 0);
  // TPOT: requests of one token have none; of two, one gap.
  options = {.warmup_s = 1, .duration_s = 5, .ttft_slo_s = 10, .tpot_slo_s = 1e-6};
  EXPECT_EQ(RunLoad(model, {.concurrency = 1}, alike, options).goodput_share, 1);
  const TraceOptions two = {.prompt_tokens = "500", .output_tokens = "2"};
  EXPECT_EQ(RunLoad(model, {.concurrency = 1}, two, options).goodput_share, 0);
  options.tpot_slo_s = 1;
  EXPECT_EQ(RunLoad(model, {.concurrency = 1}, two, options).goodput_share, 1);
}

TEST(ClusterRunTest, RefusedRequestsAreNotGood) {
  const ClusterModel model = Make({.max_sequences = 1});
  ClusterRunOptions options = {
      .warmup_s = 5, .duration_s = 10, .ttft_slo_s = 1e4, .tpot_slo_s = 1e4, .max_waiting = 4};
  const ClusterResult r = RunLoad(model, {.request_rate = 100}, {}, options);
  EXPECT_GT(r.refused, 500);
  EXPECT_LT(r.refused, r.requests);
  EXPECT_NEAR(r.goodput_share, 1 - static_cast<double>(r.refused) / r.requests, 1e-9);
}

TEST(ClusterRunTest, AFullCachePreempts) {
  // Just enough memory for a few long sequences a rank.
  const ClusterModel model = Make({.gpu_memory_bytes = uint64_t{64'500'000'000 + 4'000'000'000}});
  ASSERT_LT(model.cache_tokens(), 40000);
  const ClusterResult r =
      RunLoad(model, {.concurrency = 200}, {.prompt_tokens = "2000", .output_tokens = "2000"});
  EXPECT_GT(r.cache_max, 0.97);
  EXPECT_LE(r.cache_max, 1);
  EXPECT_GT(r.preemptions, 0);
}

TEST(ClusterRunTest, SpeculationAndMoreNodesAnswerFaster) {
  const TraceOptions trace = {.prompt_tokens = "100:300", .output_tokens = "200"};
  const double base = RunLoad(Make(), {.concurrency = 256}, trace).output_tokens_per_s;
  EXPECT_GT(
      RunLoad(Make({.mtp_acceptance = 0.85}), {.concurrency = 256}, trace).output_tokens_per_s,
      1.2 * base);
  const ClusterModel more = Make({.num_nodes = 4});
  EXPECT_GT(RunLoad(more, {.concurrency = 512}, trace).output_tokens_per_s, 1.3 * base);
}

TEST(SimulatedEngineTest, ClockAndTokens) {
  const ClusterModel model = Make();
  SimulatedEngine engine(model);
  EXPECT_EQ(engine.info().num_dp_ranks, 16);
  StepPlan plan;
  plan.sequences.push_back({.id = 5, .dp_rank = 15, .num_tokens = 10, .sample = true});
  plan.sequences.push_back({.id = 6, .dp_rank = 0, .num_tokens = 10});
  const auto result = engine.Execute(plan);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->sampled.size(), 1u);
  EXPECT_DOUBLE_EQ(engine.now_s(), model.Cost(plan).seconds());
  EXPECT_DOUBLE_EQ(result->device->busy_seconds + result->device->idle_seconds, engine.now_s());
  const double once = engine.now_s();
  EXPECT_EQ(engine.Execute(plan)->sampled, result->sampled);
  EXPECT_DOUBLE_EQ(engine.now_s(), 2 * once);
  engine.WaitUntil(once);  // over already
  EXPECT_DOUBLE_EQ(engine.now_s(), 2 * once);
  engine.WaitUntil(7);
  EXPECT_EQ(engine.now_s(), 7);
  plan.sequences[0].dp_rank = 16;
  EXPECT_THAT(std::string(engine.Execute(plan).status().message()), HasSubstr("on rank 16"));
  EXPECT_EQ(engine.now_s(), 7);
}

}  // namespace
}  // namespace latentd
