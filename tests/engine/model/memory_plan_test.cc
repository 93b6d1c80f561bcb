#include "engine/model/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "tests/engine/model/tiny_checkpoint.h"

namespace latentd {
namespace {

using testing::HasSubstr;

ModelConfig ConfigOf(const std::filesystem::path& file) {
  const auto config = ParseModelConfig(ReadAll(file));
  EXPECT_TRUE(config.ok()) << config.status();
  return *config;
}

TEST(MemoryPlanTest, DeepSeekV3Has671BillionParameters) {
  const ModelConfig config = ConfigOf("deploy/configs/deepseek-v3.json");
  const MemoryPlan plan =
      MakeMemoryPlan(config, {.cache_format = CacheFormat::kBf16, .num_blocks = 10});
  EXPECT_EQ(plan.weights().parameters, 671'026'419'200);
  EXPECT_EQ(plan.part(WeightPart::kEmbedding).parameters, 129280LL * 7168);
  EXPECT_EQ(plan.part(WeightPart::kRoutedExperts).parameters, 58LL * 256 * 3 * 7168 * 2048);
  // The MTP layer's own copies of embedding and head are in its share.
  EXPECT_GT(plan.part(WeightPart::kMtp).parameters, 11'000'000'000);
  // The released files have 688.6 GB, the MTP layer with them.
  const double gigabytes =
      static_cast<double>(plan.weights().stored_bytes + plan.part(WeightPart::kMtp).stored_bytes) /
      1e9;
  EXPECT_NEAR(gigabytes, 688.6, 0.1);
  EXPECT_EQ(plan.cache_bytes_per_token, 61u * 576 * 2);
  EXPECT_EQ(plan.cache_bytes(), 10u * 64 * 61 * 576 * 2);
  EXPECT_EQ(plan.total_bytes(), plan.weights().memory_bytes + plan.cache_bytes());
}

// What the plan says of a checkpoint is what its file holds.
TEST(MemoryPlanTest, BytesOfACachedToken) {
  const ModelConfig config = ConfigOf("deploy/configs/deepseek-v3.json");
  const auto bytes = [&](CacheFormat format) {
    return MakeMemoryPlan(config, {.cache_format = format}).cache_bytes_per_token;
  };
  const uint64_t layers = config.num_hidden_layers;
  EXPECT_EQ(bytes(CacheFormat::kF32), layers * 4 * 576);
  EXPECT_EQ(bytes(CacheFormat::kBf16), layers * 2 * 576);
  EXPECT_EQ(bytes(CacheFormat::kFp8), layers * (512 + 2 * 64 + 4));
}

TEST(MemoryPlanTest, StoredBytesAreThoseOfTheFiles) {
  for (const std::filesystem::path& dir :
       {std::filesystem::path("deploy/demo-model"), kVariants / "f32", kVariants / "fp8",
        kVariants / "fp8_blocks", kVariants / "sharded", kVariants / "attention_bias",
        kVariants / "tie_word_embeddings", kVariants / "n_shared_experts_0", kVariants / "sizes"}) {
    const MemoryPlan plan = MakeMemoryPlan(ConfigOf(dir / "config.json"), {});
    const auto checkpoint = Checkpoint::Open(dir);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    EXPECT_EQ(plan.weights().stored_bytes + plan.part(WeightPart::kMtp).stored_bytes,
              (*checkpoint)->num_bytes())
        << dir;
  }
}

TEST(MemoryPlanTest, WeightStorage) {
  const ModelConfig config = ConfigOf("deploy/demo-model/config.json");
  const MemoryPlan stored = MakeMemoryPlan(config, {});
  const MemoryPlan bf16 = MakeMemoryPlan(config, {.weight_storage = WeightStorage::kBf16});
  const MemoryPlan f32 = MakeMemoryPlan(config, {.weight_storage = WeightStorage::kF32});
  EXPECT_EQ(stored.weights().memory_bytes, stored.weights().stored_bytes);
  EXPECT_EQ(stored.weights().stored_bytes, f32.weights().stored_bytes);
  EXPECT_EQ(f32.weights().memory_bytes, 4u * f32.weights().parameters);
  const uint64_t corrections = 4 * 16;  // of 4 MoE layers, f32 everywhere
  EXPECT_EQ(bf16.weights().memory_bytes, 2u * bf16.weights().parameters + 2 * corrections);
}

// Everything but the routed experts is on every rank; those are on one rank each.
TEST(MemoryPlanTest, RanksShareTheRoutedExperts) {
  const ModelConfig config = ConfigOf("deploy/configs/deepseek-v3.json");
  const MemoryPlan whole = MakeMemoryPlan(config, {});
  for (const int32_t world_size : {1, 2, 16, 24, 300}) {
    MemoryPlan::Part routed;
    for (int32_t rank = 0; rank < world_size; ++rank) {
      const MemoryPlan plan =
          MakeMemoryPlan(config, {.placement = {.rank = rank, .world_size = world_size}});
      for (int i = 0; i < kNumWeightParts; ++i) {
        const auto part = static_cast<WeightPart>(i);
        if (part == WeightPart::kRoutedExperts || part == WeightPart::kMtp) continue;
        ASSERT_EQ(plan.part(part).memory_bytes, whole.part(part).memory_bytes);
      }
      routed.parameters += plan.part(WeightPart::kRoutedExperts).parameters;
      routed.stored_bytes += plan.part(WeightPart::kRoutedExperts).stored_bytes;
      routed.memory_bytes += plan.part(WeightPart::kRoutedExperts).memory_bytes;
    }
    EXPECT_EQ(routed.parameters, whole.part(WeightPart::kRoutedExperts).parameters);
    EXPECT_EQ(routed.stored_bytes, whole.part(WeightPart::kRoutedExperts).stored_bytes);
    EXPECT_EQ(routed.memory_bytes, whole.part(WeightPart::kRoutedExperts).memory_bytes);
  }
}

TEST(MemoryPlanTest, Fits) {
  const ModelConfig config = ConfigOf("deploy/demo-model/config.json");
  const MemoryPlan plan = MakeMemoryPlan(config, {.num_blocks = 100});
  const uint64_t total = plan.total_bytes();
  EXPECT_EQ(plan.BlocksFor(total), 100);
  EXPECT_EQ(plan.BlocksFor(total - 1), 99);
  EXPECT_EQ(plan.BlocksFor(0), 0);
  EXPECT_TRUE(CheckFits(plan, total).ok());
  const absl::Status status = CheckFits(plan, total - 1);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(std::string(status.message()),
            "too little memory: weights take 15.44 MiB and 100 KV cache blocks 70.31 MiB, together "
            "85.75 MiB; 85.75 MiB are available, enough for 99 blocks");
}

TEST(MemoryPlanTest, Table) {
  const ModelConfig config = ConfigOf("deploy/configs/deepseek-v3.json");
  const std::string table = MakeMemoryPlan(config, {.num_blocks = 1000}).ToString();
  EXPECT_THAT(table, HasSubstr("routed experts         653908770816   609.15 GiB   609.15 GiB\n"));
  EXPECT_THAT(table, HasSubstr("all weights            671026419200   626.92 GiB   626.92 GiB\n"));
  EXPECT_THAT(table, HasSubstr("KV cache: 140544 bytes a token, 8994816 a block of 64 tokens\n"));
  EXPECT_THAT(table, HasSubstr("KV cache: 1000 blocks (64000 tokens), 8.38 GiB\n"));
}

}  // namespace
}  // namespace latentd
