#include "server/engine_factory.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr char kModel[] = "tests/golden/variants/base";

ModelConfig Model() {
  auto model = LoadModelConfig(kModel);
  EXPECT_TRUE(model.ok()) << model.status();
  return *model;
}

// Remembers what it is told.
class Told : public LoadListener {
 public:
  void OnPhase(std::string_view phase) override { phases.emplace_back(phase); }
  void OnPlan(const std::string& table) override { plans.push_back(table); }
  void OnProgress(uint64_t loaded, uint64_t total) override { complete = loaded == total; }

  std::vector<std::string> phases, plans;
  bool complete = false;
};

TEST(EngineFactoryTest, NamesStandForEngines) {
  EXPECT_EQ(*ChooseEngine("cpu"), EngineKind::kCpu);
  EXPECT_EQ(EngineName(EngineKind::kCpu), "cpu");
  EXPECT_EQ(EngineName(EngineKind::kCuda), "cuda");
  ASSERT_TRUE(ChooseEngine("auto").ok());
  EXPECT_TRUE(ChooseEngine(EngineName(*ChooseEngine("auto"))).ok());
  const absl::Status unknown = ChooseEngine("tpu").status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("'tpu'; allowed are auto, cpu, cuda"));
}

TEST(EngineFactoryTest, MakesTheCpuEngineAndTellsHowItGoes) {
  Told told;
  const auto engine =
      MakeEngine(Model(), kModel, LoadFormat::kSafetensors,
                 {.num_blocks = 3, .max_step_tokens = 8, .max_sequences = 2, .threads = 1}, &told);
  ASSERT_TRUE(engine.ok()) << engine.status();
  EXPECT_EQ((*engine)->info().num_blocks, 3);
  EXPECT_EQ((*engine)->info().max_step_tokens, 8);
  EXPECT_EQ((*engine)->info().max_sequences, 2);
  EXPECT_FALSE((*engine)->lost());
  EXPECT_THAT(told.phases, ElementsAre("weights", "engine"));
  EXPECT_THAT(told.plans, ElementsAre(HasSubstr("KV cache: 3 blocks")));
  EXPECT_TRUE(told.complete);
  // It cannot tell where the time of a step goes.
  const auto families = ProfileStep(engine->get(), {});
  ASSERT_TRUE(families.ok());
  EXPECT_THAT(*families, IsEmpty());
}

TEST(EngineFactoryTest, WhatDoesNotFitIsRefusedBeforeAnythingIsRead) {
  Told told;
  const EngineSettings settings{.num_blocks = 1 << 30};
  const auto engine =
      MakeEngine(Model(), "no/such/model", LoadFormat::kSafetensors, settings, &told);
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(told.plans.size(), 1u);
  const auto memory = PlanEngineMemory(Model(), settings, 1 << 20);
  ASSERT_TRUE(memory.ok()) << memory.status();
  EXPECT_EQ(memory->fits.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(memory->num_blocks, 1 << 30);
  EXPECT_TRUE(PlanEngineMemory(Model(), {.num_blocks = 1}, uint64_t{1} << 40)->fits.ok());
}

// The CPU's cache is f32, a GPU's bf16.
TEST(EngineFactoryTest, BlocksHaveTheSizeOfTheirEngine) {
  EXPECT_EQ(CacheBytesPerBlock(Model(), EngineKind::kCpu, CacheFormat::kF32),
            2 * CacheBytesPerBlock(Model(), EngineKind::kCuda, CacheFormat::kBf16));
  EXPECT_EQ(CacheBytesPerBlock(Model(), EngineKind::kCpu, CacheFormat::kF32),
            CacheBytesPerBlock(Model(), EngineKind::kCpu, CacheFormat::kFp8));
  const int64_t rope = Model().qk_rope_head_dim;
  EXPECT_EQ(CacheBytesPerBlock(Model(), EngineKind::kCuda, CacheFormat::kFp8),
            64u * Model().num_hidden_layers * (Model().kv_lora_rank + 2 * rope + 4));
}

TEST(EngineFactoryTest, CacheFormatsAreTheEngines) {
  EXPECT_EQ(*ChooseCacheFormat("auto", EngineKind::kCuda), CacheFormat::kBf16);
  EXPECT_EQ(*ChooseCacheFormat("bf16", EngineKind::kCuda), CacheFormat::kBf16);
  EXPECT_EQ(*ChooseCacheFormat("fp8", EngineKind::kCuda), CacheFormat::kFp8);
  EXPECT_EQ(*ChooseCacheFormat("auto", EngineKind::kCpu), CacheFormat::kF32);
  EXPECT_EQ(*ChooseCacheFormat("fp8", EngineKind::kCpu), CacheFormat::kFp8);
  for (const auto& [name, kind] :
       {std::pair{"bf16", EngineKind::kCpu}, std::pair{"int8", EngineKind::kCuda},
        std::pair{"", EngineKind::kCuda}}) {
    const absl::Status status = ChooseCacheFormat(name, kind).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("kv_cache_dtype"));
  }
}

}  // namespace
}  // namespace latentd
