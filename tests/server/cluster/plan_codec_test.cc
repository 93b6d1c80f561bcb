#include "server/cluster/plan_codec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>

#include "tests/server/cluster/random_plan.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

TEST(PlanCodecTest, APlanComesBackAsItWas) {
  std::mt19937_64 random(1);
  StepPlan decoded;  // used again: nothing of the plan before may be left
  for (int i = 0; i < 2000; ++i) {
    const StepPlan plan = RandomPlan(&random);
    const absl::Status status = DecodePlan(Encoded(plan), &decoded);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_EQ(Text(decoded), Text(plan));
    ASSERT_EQ(Encoded(decoded), Encoded(plan));
  }
}

TEST(PlanCodecTest, AResultComesBackAsItWas) {
  std::mt19937_64 random(2);
  StepResult decoded;
  for (int i = 0; i < 2000; ++i) {
    const StepResult result = RandomResult(&random);
    const absl::Status status = DecodeResult(Encoded(result), &decoded);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(decoded.sampled, result.sampled);
    ASSERT_EQ(decoded.device.has_value(), result.device.has_value());
    if (result.device) {
      EXPECT_EQ(decoded.device->busy_seconds, result.device->busy_seconds);
      EXPECT_EQ(decoded.device->idle_seconds, result.device->idle_seconds);
    }
  }
}

TEST(PlanCodecTest, EveryFieldTravels) {
  StepPlan plan;
  plan.step = int64_t{1} << 40;
  plan.sequences = {{.id = ~uint64_t{0},
                     .dp_rank = 15,
                     .num_computed_tokens = 1 << 20,
                     .num_tokens = 2,
                     .num_blocks = 3,
                     .num_suppressed = 1,
                     .sample = true,
                     .sampling = {.temperature = 0.5f,
                                  .top_p = 0.25f,
                                  .top_k = 40,
                                  .min_p = 0.125f,
                                  .seed = ~uint64_t{1},
                                  .sample_index = 7}}};
  plan.tokens = {129279, 0};
  plan.blocks = {1 << 30, 0, 5};
  plan.suppressed = {77};
  plan.shape = {.num_tokens = 9, .num_sequences = 4, .decode = true};
  StepPlan decoded;
  ASSERT_TRUE(DecodePlan(Encoded(plan), &decoded).ok());
  EXPECT_EQ(Text(decoded), Text(plan));
}

TEST(PlanCodecTest, WhatIsCutOrLongerIsRefused) {
  std::mt19937_64 random(3);
  StepPlan plan;
  StepResult result;
  for (int i = 0; i < 20; ++i) {
    const std::string plan_bytes = Encoded(RandomPlan(&random));
    for (size_t size = 0; size < plan_bytes.size(); ++size) {
      ASSERT_FALSE(DecodePlan(plan_bytes.substr(0, size), &plan).ok()) << size;
    }
    EXPECT_FALSE(DecodePlan(plan_bytes + '\0', &plan).ok());
    const std::string result_bytes = Encoded(RandomResult(&random));
    for (size_t size = 0; size < result_bytes.size(); ++size) {
      ASSERT_FALSE(DecodeResult(result_bytes.substr(0, size), &result).ok()) << size;
    }
    EXPECT_FALSE(DecodeResult(result_bytes + '\0', &result).ok());
  }
}

// One random byte is another: either it is refused, or it is a value that encodes to just that.
TEST(PlanCodecTest, WhatIsAcceptedIsWhatWouldBeSent) {
  std::mt19937_64 random(4);
  StepPlan plan;
  StepResult result;
  int num_refused = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string bytes = Encoded(RandomPlan(&random));
    bytes[random() % std::min<size_t>(bytes.size(), 200)] = static_cast<char>(random());
    if (DecodePlan(bytes, &plan).ok()) {
      ASSERT_EQ(Encoded(plan), bytes);
    } else {
      ++num_refused;
    }
    bytes = Encoded(RandomResult(&random));
    bytes[random() % bytes.size()] = static_cast<char>(random());
    if (DecodeResult(bytes, &result).ok()) {
      ASSERT_EQ(Encoded(result), bytes);
    }
  }
  EXPECT_GT(num_refused, 1000);
}

TEST(PlanCodecTest, CountsThatNoMemoryHoldsAreRefusedBeforeAnyIsTaken) {
  StepPlan plan;
  std::string bytes = Encoded(plan);
  const uint32_t huge = 0xffffffff;
  for (size_t offset = bytes.size() - 16; offset < bytes.size(); offset += 4) {
    std::string changed = bytes;
    std::memcpy(changed.data() + offset, &huge, sizeof(huge));
    const absl::Status status = DecodePlan(changed, &plan);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), HasSubstr("by its own count"));
  }
}

}  // namespace
}  // namespace latentd
