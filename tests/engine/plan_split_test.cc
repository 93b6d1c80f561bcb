#include "engine/plan_split.h"

#include <string>
#include <vector>

#include "gtest/gtest.h"

namespace latentd {
namespace {

StepPlan MakePlan() {
  StepPlan plan;
  plan.step = 7;
  plan.sequences = {
      {.id = 1, .dp_rank = 2, .num_tokens = 2, .num_blocks = 1, .sample = true},
      {.id = 2,
       .dp_rank = 0,
       .num_tokens = 3,
       .num_blocks = 2,
       .num_suppressed = 1,
       .sample = true},
      {.id = 3, .dp_rank = 2, .num_tokens = 4, .num_blocks = 1},
      {.id = 4, .dp_rank = 2, .num_tokens = 1, .num_blocks = 1, .sample = true},
  };
  plan.tokens = {10, 11, 20, 21, 22, 30, 31, 32, 33, 40};
  plan.blocks = {100, 200, 201, 300, 400};
  plan.suppressed = {9};
  return plan;
}

TEST(PlanSplitTest, SharesHoldWhatIsTheirsInItsOrder) {
  std::vector<StepPlan> shares(5);
  shares[1].tokens = {1, 2, 3};  // of an older step
  SplitPlan(MakePlan(), 3, &shares);
  ASSERT_EQ(shares.size(), 3);
  for (const StepPlan& share : shares) {
    EXPECT_EQ(share.step, 7);
    EXPECT_EQ(share.shape.num_tokens, 7);
    EXPECT_EQ(share.shape.num_sequences, 3);
    EXPECT_FALSE(share.shape.decode);
  }
  EXPECT_EQ(shares[0].tokens, (std::vector<TokenId>{20, 21, 22}));
  EXPECT_EQ(shares[0].blocks, (std::vector<BlockId>{200, 201}));
  EXPECT_EQ(shares[0].suppressed, (std::vector<TokenId>{9}));
  EXPECT_TRUE(shares[1].empty());
  EXPECT_TRUE(shares[1].tokens.empty());
  ASSERT_EQ(shares[2].sequences.size(), 3);
  EXPECT_EQ(shares[2].sequences[1].id, 3);
  EXPECT_EQ(shares[2].tokens, (std::vector<TokenId>{10, 11, 30, 31, 32, 33, 40}));
  EXPECT_EQ(shares[2].blocks, (std::vector<BlockId>{100, 300, 400}));
  EXPECT_TRUE(shares[2].suppressed.empty());
}

TEST(PlanSplitTest, ChecksWhatItRequires) {
  EXPECT_EQ(CheckSplit(MakePlan(), 3), absl::OkStatus());
  EXPECT_EQ(CheckSplit({}, 1), absl::OkStatus());
  const auto refuses = [](void (*change)(StepPlan&), const char* words) {
    StepPlan plan = MakePlan();
    change(plan);
    const absl::Status status = CheckSplit(plan, 3);
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << words;
    EXPECT_NE(std::string(status.message()).find(words), std::string::npos) << status;
  };
  refuses([](StepPlan& p) { p.sequences[1].dp_rank = 3; }, "sequence 2");
  refuses([](StepPlan& p) { p.sequences[1].dp_rank = -1; }, "dp_rank -1 of 3");
  refuses([](StepPlan& p) { p.sequences[3].num_tokens = -1; }, "sequence 4");
  refuses([](StepPlan& p) { p.sequences[0].num_blocks = -1; }, "num_blocks -1");
  refuses([](StepPlan& p) { p.sequences[0].num_suppressed = -1; }, "num_suppressed -1");
  refuses([](StepPlan& p) { p.tokens.pop_back(); }, "9 tokens");
  refuses([](StepPlan& p) { p.blocks.push_back(0); }, "6 blocks");
  refuses([](StepPlan& p) { p.suppressed.clear(); }, "0 suppressed");
}

TEST(PlanSplitTest, ADecodeStepIsOneTokenAndASampleOfEverySequence) {
  StepPlan plan;
  plan.sequences.resize(2);
  for (int32_t rank : {0, 1}) {
    plan.sequences[rank].dp_rank = rank;
    plan.sequences[rank].num_tokens = 1;
    plan.sequences[rank].sample = true;
  }
  plan.tokens = {1, 2};
  std::vector<StepPlan> shares;
  SplitPlan(plan, 2, &shares);
  EXPECT_TRUE(shares[0].shape.decode);
  plan.sequences[1].sample = false;
  SplitPlan(plan, 2, &shares);
  EXPECT_FALSE(shares[0].shape.decode);
  SplitPlan(StepPlan(), 2, &shares);
  EXPECT_FALSE(shares[1].shape.decode);
}

TEST(PlanSplitTest, ResultsComeBackInTheOrderOfThePlan) {
  const std::vector<StepResult> results = {
      {.sampled = {5}, .device = DeviceTimes{.idle_seconds = 1, .busy_seconds = 2}},
      {.sampled = {}, .device = DeviceTimes{.idle_seconds = 3, .busy_seconds = 4}},
      {.sampled = {6, 7}}};
  const absl::StatusOr<StepResult> merged = MergeResults(MakePlan(), results);
  ASSERT_TRUE(merged.ok()) << merged.status();
  EXPECT_EQ(merged->sampled, (std::vector<TokenId>{6, 5, 7}));
  ASSERT_TRUE(merged->device.has_value());
  EXPECT_EQ(merged->device->idle_seconds, 3);
}

TEST(PlanSplitTest, ARankWithTooFewOrTooManyTokensIsNamed) {
  const absl::Status few =
      MergeResults(MakePlan(), {StepResult{{5}}, StepResult{}, StepResult{{6}}}).status();
  EXPECT_EQ(few.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(few.message(), "rank 2: step 7: 1 tokens for 2 sequences");
  const absl::Status many =
      MergeResults(MakePlan(), {StepResult{{5}}, StepResult{{1}}, StepResult{{6, 7}}}).status();
  EXPECT_EQ(many.message(), "rank 1: step 7: 1 tokens for 0 sequences");
}

}  // namespace
}  // namespace latentd
