// Background requests: they run on what all others leave.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "scheduler/scheduler.h"
#include "tests/scheduler/background_load.h"
#include "tests/scheduler/scheduler_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class BackgroundTest : public SchedulerTest {
 protected:
  void AddBackground(RequestId id, int num_tokens, int max_new_tokens, int32_t priority = 0) {
    Request request = MakeRequest(id, num_tokens, max_new_tokens);
    request.background = true;
    request.priority = priority;
    ASSERT_TRUE(Add(request).ok());
  }
};

TEST_F(BackgroundTest, TheOthersTakeTheirTokensFirstHoweverYoung) {
  Make(SmallEngine(), {.max_step_tokens = 8});
  AddBackground(1, 6, 4);
  Step();
  ASSERT_TRUE(Add(2, 7, 4).ok());
  StepPlan plan = Step();
  EXPECT_THAT(Ids(plan), ElementsAre(2, 1));
  EXPECT_THAT(NumTokens(plan), ElementsAre(7, 1));
  EXPECT_EQ(scheduler_->num_background_tokens(), 1);
  ASSERT_TRUE(Add(3, 7, 4).ok());
  plan = Step();
  EXPECT_THAT(Ids(plan), ElementsAre(2, 3));  // nothing is left
  EXPECT_EQ(scheduler_->num_background_tokens(), 0);
  RunToEnd();
}

TEST_F(BackgroundTest, EvenTheHighestPriorityWaitsForTheOthers) {
  Make(SmallEngine(), {.max_step_tokens = 8});
  AddBackground(1, 8, 2, /*priority=*/1000);
  Request other = MakeRequest(2, 8, 2);
  other.priority = -1000;
  ASSERT_TRUE(Add(other).ok());
  EXPECT_THAT(Ids(Step()), ElementsAre(2));
  RunToEnd();
}

TEST_F(BackgroundTest, ASeatIsThatOfTheYoungestOfTheLowestPriority) {
  Make(SmallEngine(), {.max_running = 3});
  AddBackground(1, 3, 9);
  AddBackground(2, 3, 9);
  AddBackground(3, 3, 9, /*priority=*/1);
  Step();
  ASSERT_TRUE(Add(4, 3, 9).ok());
  EXPECT_THAT(Ids(Step()), ElementsAre(4, 1, 3));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_EQ(scheduler_->load(0).num_background, 2);
  RunToEnd();
}

TEST_F(BackgroundTest, BlocksAreTakenAsTheyAreNeededAndNoMore) {
  Make(SmallEngine());
  AddBackground(1, 7, 2);  // 2 blocks each
  AddBackground(2, 7, 2);
  AddBackground(3, 7, 2);
  Step();
  ASSERT_TRUE(Add(4, 13, 2).ok());  // 4 of 8, where 2 are free
  EXPECT_THAT(Ids(Step()), ElementsAre(4, 1, 2));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  RunToEnd();
}

TEST_F(BackgroundTest, NobodyIsPreemptedForOneThatWouldStillNotFit) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 19, 9).ok());  // 5 of 8 blocks
  AddBackground(2, 3, 9);
  Step();
  Step();
  ASSERT_EQ(scheduler_->load(0).num_background, 1);
  ASSERT_TRUE(Add(3, 14, 2).ok());  // 4
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  EXPECT_EQ(scheduler_->num_preemptions(), 0);
  RunToEnd();
}

// The blocks of a hit that a background sequence alone holds come with the hit: they are not there
// to be had a second time.
TEST_F(BackgroundTest, AHitOnItsBlocksIsNotCountedTwice) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 14, 2).ok());  // 4 of 8 blocks
  AddBackground(2, 9, 3);           // 3, of which 2 are full
  Step();
  Request follower = MakeRequest(2, 9, 2);
  follower.id = 3;
  follower.prompt.resize(17, 5);  // 5 blocks, 2 of them the background request's
  ASSERT_TRUE(Add(follower).ok());
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  EXPECT_EQ(scheduler_->num_preemptions(), 0);
  RunToEnd();
}

TEST_F(BackgroundTest, ThePreemptedFindsItsBlocksWhereNobodyNeededThem) {
  Make(SmallEngine(), {.max_running = 1});
  AddBackground(1, 10, 9);
  Step();
  ASSERT_TRUE(Add(2, 3, 1).ok());
  EXPECT_THAT(Ids(Step()), ElementsAre(2));
  const StepPlan plan = Step();
  ASSERT_THAT(Ids(plan), ElementsAre(1));
  EXPECT_EQ(plan.sequences[0].num_computed_tokens, 8);  // of 11: its full blocks
  EXPECT_EQ(plan.sequences[0].num_tokens, 3);
  RunToEnd();
}

TEST_F(BackgroundTest, NoneIsAdmittedInAStepThatPreemptedOne) {
  Make(SmallEngine(), {.max_running = 2});
  AddBackground(1, 7, 9);
  AddBackground(2, 20, 9);  // 5 blocks
  Step();
  AddBackground(3, 3, 9);
  ASSERT_TRUE(Add(4, 3, 2).ok());
  EXPECT_THAT(Ids(Step()), ElementsAre(4, 1));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  RunToEnd();
}

// Else the one that is admitted into the last block is preempted when the running ones grow.
TEST_F(BackgroundTest, AdmissionLeavesABlockToEachThatRuns) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 13, 9).ok());  // 4 blocks
  AddBackground(2, 7, 2);           // 2: leaves 2
  AddBackground(3, 3, 2);           // 1: would leave 1 to two that run
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  RunToEnd();
}

TEST_F(BackgroundTest, ItsTokensAreCappedBesideOthersAlone) {
  Make(SmallEngine(), {.max_step_tokens = 16, .max_background_tokens = 4});
  AddBackground(1, 14, 2);
  ASSERT_TRUE(Add(2, 3, 1).ok());
  EXPECT_THAT(NumTokens(Step()), ElementsAre(3, 4));
  EXPECT_THAT(NumTokens(Step()), ElementsAre(10));
  RunToEnd();
}

TEST_F(BackgroundTest, EachClassHasItsOwnMaxWaiting) {
  Make(SmallEngine(), {.max_waiting = 1});
  AddBackground(1, 3, 2);
  Request second = MakeRequest(2, 3, 2);
  second.background = true;
  EXPECT_TRUE(absl::IsResourceExhausted(Add(second)));
  EXPECT_TRUE(Add(3, 3, 2).ok());
  EXPECT_TRUE(absl::IsResourceExhausted(Add(4, 3, 2)));
  EXPECT_EQ(scheduler_->num_background_waiting(), 1);
  EXPECT_EQ(scheduler_->num_waiting(), 2);
  RunToEnd();
}

TEST_F(BackgroundTest, ItGoesWhereTheOthersWouldSeeNoDifference) {
  EngineInfo info = SmallEngine();
  info.num_dp_ranks = 2;
  Make(info);
  AddBackground(1, 27, 2);  // 7 of a rank's 8 blocks
  Step();
  ASSERT_TRUE(Add(2, 7, 4).ok());
  const StepPlan plan = Step();
  EXPECT_EQ(plan.sequences[0].id, 2);
  EXPECT_EQ(plan.sequences[0].dp_rank, 0);  // as if both were empty
  RunToEnd();
}

TEST_F(BackgroundTest, OnlyWhoWasInAFailedStepIsSuspect) {
  Make(SmallEngine(), {.max_running = 1});
  AddBackground(1, 3, 9);
  AddBackground(2, 3, 9);
  const StepPlan plan = Schedule();
  const auto failed = scheduler_->Abort(plan, absl::UnavailableError("broken"));
  ASSERT_EQ(failed.size(), 1u);
  EXPECT_TRUE(failed[0].suspect);
  const auto others = scheduler_->FailAll(absl::UnavailableError("over"));
  ASSERT_EQ(others.size(), 1u);
  EXPECT_FALSE(others[0].suspect);
  EXPECT_THAT(Ids(Schedule()), IsEmpty());
}

// The figures that README.md gives, of a shorter time.
TEST(BackgroundLoadTest, AnEndlessBacklogCostsTheOthersNextToNothing) {
  BackgroundLoad load;
  load.duration = absl::Minutes(10);
  const BackgroundLoadResult without = RunBackgroundLoad(load);
  load.backlog = load.seats + load.seats / 4;
  const BackgroundLoadResult with = RunBackgroundLoad(load);
  ASSERT_GT(without.ttft_ms.size(), 10000u);
  ASSERT_NEAR(without.used, 0.7, 0.05);
  EXPECT_GT(with.used, 0.9);
  for (const double q : {0.5, 0.99}) {
    EXPECT_LE(BackgroundLoadResult::Quantile(with.ttft_ms, q),
              1.15 * BackgroundLoadResult::Quantile(without.ttft_ms, q));
    EXPECT_LE(BackgroundLoadResult::Quantile(with.itl_ms, q),
              1.15 * BackgroundLoadResult::Quantile(without.itl_ms, q));
  }
}

}  // namespace
}  // namespace latentd
