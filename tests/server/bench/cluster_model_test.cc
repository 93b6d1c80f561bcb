#include "server/bench/cluster_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <string>

#include "server/bench/roofline.h"
#include "tests/server/bench/model_files.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

constexpr ClusterModelOptions kOneGpu = {
    .num_nodes = 1, .gpus_per_node = 1, .max_step_tokens = 8192};

ClusterModel Make(const ModelConfig& model, const ClusterModelOptions& options) {
  auto cluster = ClusterModel::Make(model, options);
  EXPECT_TRUE(cluster.ok()) << cluster.status();
  return *std::move(cluster);
}

// Sequences, `count` on each of `ranks`, with `computed` tokens in the cache and `tokens` to come.
StepPlan Plan(int ranks, int count, int computed, int tokens) {
  StepPlan plan;
  for (int i = 0; i < ranks * count; ++i) {
    plan.sequences.push_back({.id = static_cast<RequestId>(i),
                              .dp_rank = i / count,
                              .num_computed_tokens = computed,
                              .num_tokens = tokens,
                              .sample = true});
  }
  plan.tokens.resize(size_t{1} * ranks * count * tokens);  // StepRoofline counts them
  return plan;
}

double Ms(const ClusterModel& cluster, const StepPlan& plan) {
  return 1e3 * cluster.Cost(plan).seconds();
}

// What one H100 took (engine/cuda/README.md): the model has nothing else to stand on.
TEST(ClusterModelTest, MeasuredDecodeSteps) {
  const ClusterModel rank = Make(Shard16(), kOneGpu);
  for (const auto& [sequences, context, measured] : {std::tuple(1, 2048, 16.5),
                                                     {8, 2048, 24.8},
                                                     {32, 1800, 27.3},
                                                     {64, 800, 28.4},
                                                     {64, 2048, 30.7}}) {
    const StepCost cost = rank.Cost(Plan(1, sequences, context - 1, 1));
    EXPECT_NEAR(1e3 * cost.seconds(), measured, 0.025 * measured) << sequences << " x " << context;
    EXPECT_EQ(cost.exchange, 0);
    EXPECT_EQ(cost.leader, 0);
  }
}

// On an H200, 10,800 to 11,000 tok/s.
TEST(ClusterModelTest, MeasuredPrefill) {
  const ClusterModel rank = Make(Shard16(), kOneGpu);
  const double ms = 4 * Ms(rank, Plan(1, 4, 0, 2048));  // 16 prompts in four steps
  const double tok_s = 16 * 2048 / ms * 1e3;
  EXPECT_NEAR(tok_s, 10900, 100);
}

// The parts of that step that were measured, in ms: experts with router and gather, and all else.
TEST(ClusterModelTest, PartsOfMeasuredPrefill) {
  const StepCost cost = Make(Shard16(), kOneGpu).Cost(Plan(1, 4, 0, 2048));
  const double experts = 221 + 121 + 21 + 17 + 13, others = 142 + 100 + 55 + 45;
  EXPECT_NEAR(1e3 * cost.experts, experts, 0.05 * experts);
  EXPECT_NEAR(1e3 * cost.attention, others, 0.07 * others);
}

TEST(ClusterModelTest, MeasuredMemory) {
  const ClusterModel rank = Make(Shard16(), kOneGpu);
  EXPECT_NEAR(rank.cache_tokens(), 276000, 0.01 * 276000);
}

TEST(ClusterModelTest, EveryRankOf16HasItsShareOfTheModel) {
  const ClusterModel rank = Make(Shard16(), kOneGpu), cluster = Make(DeepSeekV3(), {});
  // A sheet computed apart says so.
  EXPECT_NEAR(cluster.weight_bytes() * 1e-9, 60.98, 0.02);
  // shard16's router knows of 16 experts only.
  EXPECT_EQ(cluster.weight_bytes() - rank.weight_bytes(), 58u * 240 * (7168 * 2 + 4));
  EXPECT_EQ(cluster.info().num_dp_ranks, 16);
  EXPECT_GT(cluster.cache_tokens(), 200000);
  EXPECT_LT(cluster.cache_tokens(), rank.cache_tokens());
}

// More GPUs: fewer experts on each, so more cache; a smaller token: more of them.
TEST(ClusterModelTest, CacheOfWhatIfs) {
  const int64_t base = Make(DeepSeekV3(), {}).cache_tokens();
  EXPECT_GT(Make(DeepSeekV3(), {.num_nodes = 4}).cache_tokens(), base + 200000);
  EXPECT_NEAR(Make(DeepSeekV3(), {.fp8_cache = true}).cache_tokens(), base * 1152.0 / 644, 200);
  // An MTP layer: a MoE layer with 16 of its experts, a matrix of 2 x 7168 rows, a layer of cache.
  const ClusterModel mtp = Make(DeepSeekV3(), {.mtp_acceptance = 0.85});
  EXPECT_NEAR((mtp.weight_bytes() - Make(DeepSeekV3(), {}).weight_bytes()) * 1e-9, 1.17, 0.1);
  EXPECT_LT(mtp.cache_tokens(), base);
}

TEST(ClusterModelTest, OneNodeIsTooSmall) {
  const auto cluster = ClusterModel::Make(DeepSeekV3(), {.num_nodes = 1});
  EXPECT_EQ(cluster.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(cluster.status().message()), HasSubstr("a rank of 8 does not fit"));
}

// A decode step of a cluster costs its ranks what one of them costs alone, the wires, the leader,
// and what chance puts on the fullest rank.
TEST(ClusterModelTest, ClusterAgainstOneRank) {
  const ClusterModel rank = Make(Shard16(), kOneGpu);
  const ClusterModel cluster = Make(DeepSeekV3(), {.imbalance = 1});
  for (const int sequences : {8, 32, 64}) {
    const StepCost one = rank.Cost(Plan(1, sequences, 1999, 1));
    const StepCost all = cluster.Cost(Plan(16, sequences, 1999, 1));
    EXPECT_DOUBLE_EQ(all.attention, one.attention);
    EXPECT_GT(all.experts, one.experts);
    EXPECT_LT(all.experts, 1.05 * one.experts);
    EXPECT_EQ(all.leader, 1e-3);
  }
}

TEST(ClusterModelTest, ExchangeOfADecodeStep) {
  ClusterModelOptions options;
  options.exchange.latency_factor = 0;
  options.exchange.nvlink_bytes = 1e12;  // so that the NICs are what counts
  const double row = 7168 + 224 + 64 + 2 * 7168, through_nic = 15 / 8.0;
  // 64 rows; without latencies the protocol with the whole rate is the fastest.
  EXPECT_NEAR(Make(DeepSeekV3(), options).Cost(Plan(16, 64, 2000, 1)).exchange,
              58 * 64 * row * through_nic / 43e9, 1e-12);
  // The graph's 80 rows for 65; every rank sends as many as the fullest.
  StepPlan uneven = Plan(16, 1, 2000, 1);
  for (int i = 0; i < 64; ++i) {
    uneven.sequences.push_back(
        {.dp_rank = 3, .num_computed_tokens = 9, .num_tokens = 1, .sample = true});
  }
  EXPECT_NEAR(Make(DeepSeekV3(), options).Cost(uneven).exchange, 58 * 80 * row * through_nic / 43e9,
              1e-12);
}

// A prompt of one rank keeps the wires and that rank busy; its experts' work is everybody's.
TEST(ClusterModelTest, APromptOfOneRankIsPaddedOnTheWireAndSharedByTheExperts) {
  const ClusterModel cluster = Make(DeepSeekV3(), {.imbalance = 1});
  StepPlan one = Plan(1, 1, 0, 2048);
  const StepCost alone = cluster.Cost(one), all = cluster.Cost(Plan(16, 1, 0, 2048));
  EXPECT_DOUBLE_EQ(alone.exchange, all.exchange);
  EXPECT_DOUBLE_EQ(alone.attention, all.attention);
  EXPECT_LT(alone.experts, 0.4 * all.experts);
}

TEST(ClusterModelTest, EveryTokenCosts) {
  const ClusterModel cluster = Make(DeepSeekV3(), {});
  double last = 0;
  for (int tokens = 1; tokens <= 2048; tokens += tokens < 300 ? 1 : 97) {
    StepPlan plan = Plan(16, 20, 500, 1);
    plan.sequences.push_back({.dp_rank = 5, .num_tokens = tokens, .sample = true});
    const double ms = Ms(cluster, plan);
    // A lone token is a decode step, padded to its graph's rows.
    if (tokens > 2) {
      EXPECT_GE(ms, last) << tokens;
    }
    last = ms;
  }
  for (const int context : {64, 500, 2000, 8000, 30000}) {
    EXPECT_GT(Ms(cluster, Plan(16, 32, 2 * context, 1)), Ms(cluster, Plan(16, 32, context, 1)));
  }
}

// What a user of two nodes expects at least, and what no hardware would allow.
TEST(ClusterModelTest, DecodeRateLiesBetweenExpectationAndRoofline) {
  const ClusterModel cluster = Make(DeepSeekV3(), {});
  for (const int sequences : {8, 32, 64, 128}) {
    const double tok_s = 16 * sequences / cluster.Cost(Plan(16, sequences, 2047, 1)).seconds();
    const double bound =
        16 * sequences / StepRoofline(Shard16(), Plan(1, sequences, 2047, 1), kH100Peak).seconds();
    EXPECT_LT(tok_s, bound) << sequences;
    EXPECT_GT(tok_s, 0.4 * bound) << sequences;
    EXPECT_GT(tok_s, 4000) << sequences;
  }
}

TEST(ClusterModelTest, RaggedContextsAreSlower) {
  const ClusterModel rank = Make(Shard16(), kOneGpu);
  StepPlan ragged;
  std::mt19937 random(1);
  double keys = 0;
  for (int i = 0; i < 64; ++i) {
    const int context = std::uniform_int_distribution<int>(256, 4096)(random);
    keys += context;
    ragged.sequences.push_back(
        {.num_computed_tokens = context - 1, .num_tokens = 1, .sample = true});
  }
  const double even = Ms(rank, Plan(1, 64, static_cast<int>(keys / 64) - 1, 1));
  // 106 us instead of 74 in each of 61 layers: about 2 ms.
  EXPECT_NEAR(Ms(rank, ragged) - even, 2.0, 0.4);
}

TEST(ClusterModelTest, Mtp) {
  const ClusterModel without = Make(DeepSeekV3(), {});
  const ClusterModel with = Make(DeepSeekV3(), {.mtp_acceptance = 0.85});
  const StepPlan decode = Plan(16, 32, 1500, 1);
  const StepCost a = without.Cost(decode), b = with.Cost(decode);
  EXPECT_NEAR(b.attention, a.attention * 1.25 / 1.85, 1e-9);
  EXPECT_NEAR(b.experts, a.experts * 1.25 / 1.85, 1e-9);
  EXPECT_NEAR(b.leader, a.leader / 1.85, 1e-9);
  // Twice the rows, but not twice the latency.
  EXPECT_GT(b.exchange, a.exchange / 1.85);
  EXPECT_LT(b.exchange, a.exchange * 2 / 1.85);
  // Prompts gain nothing.
  EXPECT_DOUBLE_EQ(Ms(with, Plan(16, 1, 0, 500)), Ms(without, Plan(16, 1, 0, 500)));
  // In a mixed step what prompts cost stays as it was.
  StepPlan mixed = decode;
  mixed.sequences.push_back({.dp_rank = 2, .num_tokens = 500, .sample = true});
  const double prompt = Ms(without, mixed) - Ms(without, decode);
  EXPECT_NEAR(Ms(with, mixed) - Ms(with, decode), prompt, 0.05 * prompt);
  EXPECT_DOUBLE_EQ(MtpCost(1), 1.45);
  EXPECT_DOUBLE_EQ(MtpCost(8), 1.25);
  EXPECT_DOUBLE_EQ(MtpCost(200), 1.25);
}

TEST(ClusterModelTest, LargestOfNormalDraws) {
  EXPECT_EQ(ExpectedLargestNormal(1), 0);
  EXPECT_NEAR(ExpectedLargestNormal(2), 1 / std::sqrt(std::acos(-1)), 1e-4);
  EXPECT_NEAR(ExpectedLargestNormal(16), 1.7660, 1e-3);  // tables of order statistics
  EXPECT_NEAR(ExpectedLargestNormal(32), 2.0697, 1e-3);
}

TEST(ClusterModelTest, PaddedSequences) {
  EXPECT_EQ(PaddedSequences(1, 256), 1);
  EXPECT_EQ(PaddedSequences(3, 256), 4);
  EXPECT_EQ(PaddedSequences(9, 256), 16);
  EXPECT_EQ(PaddedSequences(65, 256), 80);
  EXPECT_EQ(PaddedSequences(200, 256), 224);
  EXPECT_EQ(PaddedSequences(60, 62), 62);
  EXPECT_EQ(PaddedSequences(300, 256), 300);  // beyond the graphs
}

TEST(ClusterModelTest, OptionsOutOfRangeAreNamed) {
  const auto message = [](const ClusterModelOptions& options) {
    const auto cluster = ClusterModel::Make(DeepSeekV3(), options);
    EXPECT_EQ(cluster.status().code(), absl::StatusCode::kInvalidArgument);
    return std::string(cluster.status().message());
  };
  EXPECT_THAT(message({.num_nodes = 0}), HasSubstr("--nodes is 0"));
  EXPECT_THAT(message({.gpus_per_node = 17}), HasSubstr("--gpus-per-node is 17"));
  EXPECT_THAT(message({.max_step_tokens = 0}), HasSubstr("--max-step-tokens is 0"));
  EXPECT_THAT(message({.imbalance = 0.9}), HasSubstr("--imbalance is 0.9"));
  EXPECT_THAT(message({.imbalance = std::nan("")}), HasSubstr("--imbalance is nan"));
  EXPECT_THAT(message({.mtp_acceptance = 1.1}), HasSubstr("--mtp-acceptance is 1.1"));
  EXPECT_THAT(message({.exchange = {.nvlink_bytes = 0}}), HasSubstr("--nvlink is 0"));
}

TEST(ClusterModelTest, ModelsThatWereNotMeasuredAreRefused) {
  ModelConfig model = DeepSeekV3();
  model.hidden_size = 2048;
  const auto cluster = ClusterModel::Make(model, {});
  EXPECT_EQ(cluster.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(cluster.status().message()),
              HasSubstr("measured with hidden_size 7168; this model has 2048"));
  model = DeepSeekV3();
  model.num_nextn_predict_layers = 0;
  EXPECT_TRUE(ClusterModel::Make(model, {}).ok());
  EXPECT_FALSE(ClusterModel::Make(model, {.mtp_acceptance = 0.8}).ok());
}

}  // namespace
}  // namespace latentd
