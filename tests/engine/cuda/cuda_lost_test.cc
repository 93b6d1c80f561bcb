// A GPU that is lost while an engine runs on it. A program of its own: nothing of CUDA works in it
// afterwards.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <chrono>

#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/engine_harness.h"
#include "tests/engine/cuda/trap.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

class CudaLostTest : public DeviceTest {};

TEST_F(CudaLostTest, EveryLaterStepFailsAtOnce) {
  auto config = LoadModelConfig(kDemoModel);
  ASSERT_TRUE(config.ok()) << config.status();
  auto engine = MakeCudaEngine(*config, kDemoModel, LoadFormat::kSafetensors,
                               {.num_blocks = 8, .max_step_tokens = 64, .max_sequences = 2});
  StepPlan plan = Runner::MakePlan({{.tokens = SomeTokens(5, 4096, 1), .blocks = {2}}});
  plan.sequences[0].sample = true;
  ASSERT_TRUE(engine->Execute(plan).ok());
  EXPECT_FALSE(engine->lost());

  LoseTheGpu();
  const absl::Status first = engine->Execute(plan).status();
  EXPECT_EQ(first.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(first.message()), HasSubstr("rank 0: cuda"));
  EXPECT_THAT(std::string(first.message()), HasSubstr("the GPU is lost"));
  EXPECT_TRUE(engine->lost());

  const auto begin = std::chrono::steady_clock::now();
  EXPECT_EQ(engine->Execute(plan).status(), first);
  EXPECT_EQ(engine->Profile(plan).status(), first);
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::milliseconds(100));
  EXPECT_EQ(engine->info().num_blocks, 8);
  engine.reset();  // does not hang

  const auto next = CudaEngine::Create(*config, kDemoModel, LoadFormat::kSafetensors,
                                       {.num_blocks = 8}, nullptr, nullptr);
  EXPECT_EQ(next.status().code(), absl::StatusCode::kUnavailable) << next.status();
}

}  // namespace
}  // namespace latentd
