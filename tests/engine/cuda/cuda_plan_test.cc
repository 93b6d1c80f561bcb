// What the CUDA engine decides without a GPU: its memory plan, the sizes of its graphs, which
// options it refuses.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/graph_cache.h"
#include "engine/cuda/step_buffers.h"
#include "engine/cuda/step_input.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Free on an "H100 80GB HBM3" once the context is there.
constexpr uint64_t kH100Bytes = uint64_t{84'400} * 1'000'000;

ModelConfig Load(const char* file) {
  std::string text;
  FILE* in = std::fopen(file, "rb");
  EXPECT_NE(in, nullptr) << file;
  char buffer[4096];
  for (size_t n; (n = std::fread(buffer, 1, sizeof(buffer), in)) > 0;) text.append(buffer, n);
  std::fclose(in);
  auto config = ParseModelConfig(text);
  EXPECT_TRUE(config.ok()) << config.status();
  return *std::move(config);
}

TEST(CudaMemoryPlanTest, Shard16HasRoomForManyTokens) {
  const ModelConfig config = Load("deploy/configs/shard16.json");
  const auto plan = PlanCudaMemory(config, {}, kH100Bytes);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->cache_per_block, 61u * 64 * 576 * 2);
  EXPECT_LE(plan->total(), kH100Bytes);
  EXPECT_GT(plan->total() + plan->cache_per_block, kH100Bytes) << "no block is left out";
  EXPECT_GE(plan->num_blocks * 64, 230'000) << plan->ToString();
  EXPECT_THAT(plan->ToString(), HasSubstr("KV cache"));
  std::printf("%s", plan->ToString().c_str());
}

TEST(CudaMemoryPlanTest, AnFp8CacheHoldsMoreTokens) {
  const ModelConfig config = Load("deploy/configs/shard16.json");
  const auto bf16 = PlanCudaMemory(config, {}, kH100Bytes);
  const auto fp8 = PlanCudaMemory(config, {.cache_format = CacheFormat::kFp8}, kH100Bytes);
  ASSERT_TRUE(bf16.ok() && fp8.ok()) << bf16.status() << fp8.status();
  EXPECT_EQ(fp8->cache_per_block, 61u * 64 * (512 + 2 * 64 + 4));
  EXPECT_GE(fp8->num_blocks, bf16->num_blocks * 178 / 100) << fp8->ToString();
}

TEST(CudaMemoryPlanTest, MoreTokensAStepTakeMoreWorkspace) {
  const ModelConfig config = Load("deploy/configs/shard16.json");
  uint64_t before = 0;
  for (int32_t tokens : {1, 256, 2048, 8192, 16384}) {
    const auto plan = PlanCudaMemory(config, {.max_step_tokens = tokens}, kH100Bytes);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_GE(plan->workspace, before);
    before = plan->workspace;
  }
}

TEST(CudaMemoryPlanTest, WhatDoesNotFitIsRefusedWithNumbers) {
  const ModelConfig shard = Load("deploy/configs/shard16.json");
  auto plan = PlanCudaMemory(shard, {.num_blocks = 100'000}, kH100Bytes);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("100000 KV cache blocks"));
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("78.60 GiB are free"));

  plan = PlanCudaMemory(Load("deploy/configs/deepseek-v3.json"), {}, kH100Bytes);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(plan.status().message()), HasSubstr("weights take 6"));

  plan = PlanCudaMemory(shard, {}, 0);
  EXPECT_EQ(plan.status().code(), absl::StatusCode::kResourceExhausted);
}

// Two nodes of eight H100.
TEST(CudaMemoryPlanTest, ARankOfDeepSeekV3FitsOnAnH100) {
  const ModelConfig config = Load("deploy/configs/deepseek-v3.json");
  for (const int32_t rank : {0, 15}) {
    const auto plan = PlanCudaMemory(
        config, {.placement = Placement{.rank = rank, .world_size = 16}}, kH100Bytes);
    ASSERT_TRUE(plan.ok()) << plan.status();
    EXPECT_NEAR(plan->weights / 1e9, 61.0, 1.0);  // 16 of 256 experts, all else
    EXPECT_GE(plan->num_blocks * 64, 190'000) << plan->ToString();
    if (rank == 0) std::printf("%s", plan->ToString().c_str());
  }
  EXPECT_EQ(PlanCudaMemory(config, {.placement = Placement{.rank = 0, .world_size = 8}}, kH100Bytes)
                .status()
                .code(),
            absl::StatusCode::kResourceExhausted)
      << "8 ranks hold twice the experts each";
}

TEST(CudaMemoryPlanTest, WrongOptionsAreNamed) {
  struct Wrong {
    CudaEngineOptions options;
    const char* message;
  };
  const Wrong cases[] = {
      {{.device = -1}, "device: -1; the least is 0"},
      {{.num_blocks = -1}, "num_blocks: -1"},
      {{.max_step_tokens = 0}, "max_step_tokens: 0; the least is 1"},
      {{.max_step_tokens = 1 << 30}, "max_step_tokens: 1073741824; the most is"},
      {{.max_sequences = 0}, "max_sequences: 0"},
      {{.max_sequences = 1 << 30}, "max_sequences: 1073741824; the most is"},
      {{.max_model_len = -1}, "max_model_len: -1"},
      {{.max_model_len = 8193}, "max_model_len: 8193; the model's max_position_embeddings is 8192"},
      {{.max_graph_sequences = -1}, "max_graph_sequences: -1"},
      {{.cache_format = CacheFormat::kF32}, "cache_format: f32; possible are bf16 and fp8"},
      {{.placement = Placement{.rank = 0, .world_size = 0}}, "world_size: 0; the least is 1"},
      {{.placement = Placement{.rank = 4, .world_size = 4}}, "rank: 4; the most is 3"},
  };
  const ModelConfig config = Load("deploy/demo-model/config.json");
  for (const Wrong& wrong : cases) {
    const auto plan = PlanCudaMemory(config, wrong.options, kH100Bytes);
    EXPECT_EQ(plan.status().code(), absl::StatusCode::kInvalidArgument) << wrong.message;
    EXPECT_THAT(std::string(plan.status().message()), HasSubstr(wrong.message));
  }
}

// The cache cannot be larger than its indices.
TEST(CudaMemoryPlanTest, MoreMemoryThanTheCacheCanUse) {
  const auto plan = PlanCudaMemory(Load("deploy/demo-model/config.json"), {}, uint64_t{1} << 60);
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_GT(plan->num_blocks, 0);
}

// ---- the pieces of a step in a group

StepLimits Limits(const ModelConfig& config, int32_t world_size, int32_t max_step_tokens = 8192) {
  CudaEngineOptions options{.max_step_tokens = max_step_tokens};
  if (world_size > 0) options.placement = Placement{.rank = 0, .world_size = world_size};
  return MakeStepLimits(config, options, 4096);
}

// What is computed together has about as many rows at the most as with an engine that is alone.
TEST(StepLimitsTest, MoreRanksHaveSmallerPieces) {
  const ModelConfig config = Load("deploy/configs/deepseek-v3.json");
  const int64_t alone = MaxExpertRows(config, 1, Limits(config, 0).piece_tokens);
  EXPECT_EQ(alone, 8192 * 9);
  EXPECT_EQ(Limits(config, 1).piece_tokens, 8192);
  EXPECT_EQ(Limits(config, 2).piece_tokens, 4224);
  EXPECT_EQ(Limits(config, 16).piece_tokens, 512);
  EXPECT_EQ(Limits(config, 16, 100).piece_tokens, 128) << "a step has no more";
  for (const int32_t world_size : {1, 2, 3, 8, 16, 32}) {
    const StepLimits limits = Limits(config, world_size);
    EXPECT_LE(MaxExpertRows(config, world_size, limits.piece_tokens), alone) << world_size;
    EXPECT_EQ(limits.piece_tokens % kRowTile, 0);
  }
  // A rank with a single expert takes a token once at the most.
  EXPECT_EQ(MaxExpertRows(config, 256, 10), 10 * (256 + 1));
}

TEST(StepShapeTest, DecodeStepsOfManyRowsComeInPieces) {
  const StepShape one = StepShape::Decode(200, 4096);
  EXPECT_EQ(one.piece_tokens, 200);
  EXPECT_THAT(one.piece_samples, ElementsAre(0, 200));
  const StepShape three = StepShape::Decode(300, 128);
  EXPECT_EQ(three.piece_tokens, 128);
  EXPECT_THAT(three.piece_samples, ElementsAre(0, 128, 256, 300));
  EXPECT_EQ(three.rows, 300);
  EXPECT_EQ(three.exchange_rows, 300);
}

TEST(GraphSizesTest, AreAscendingAndEndAtTheMost) {
  EXPECT_THAT(GraphSizes(0), ElementsAre());
  EXPECT_THAT(GraphSizes(1), ElementsAre(1));
  EXPECT_THAT(GraphSizes(3), ElementsAre(1, 2, 3));
  EXPECT_THAT(GraphSizes(33), ElementsAre(1, 2, 4, 8, 16, 24, 32, 33));
  EXPECT_THAT(GraphSizes(100), ElementsAre(1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100));
  for (int most : {2, 64, 256, 300, 1000}) {
    const std::vector<int> sizes = GraphSizes(most);
    EXPECT_TRUE(std::is_sorted(sizes.begin(), sizes.end()));
    EXPECT_EQ(std::adjacent_find(sizes.begin(), sizes.end()), sizes.end());
    EXPECT_EQ(sizes.back(), most);
  }
}

TEST(GraphCutsTest, GrowFromOneLayer) {
  EXPECT_THAT(GraphCuts(1), ElementsAre(0, 1));
  EXPECT_THAT(GraphCuts(2), ElementsAre(0, 2));
  EXPECT_THAT(GraphCuts(5), ElementsAre(0, 1, 5));
  EXPECT_THAT(GraphCuts(61), ElementsAre(0, 1, 9, 61));
}

}  // namespace
}  // namespace latentd
