#include "scheduler/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "tests/scheduler/scheduler_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

TEST_F(SchedulerTest, AnIdleSchedulerPlansNothing) {
  Make(SmallEngine());
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_TRUE(Step().empty());
}

TEST_F(SchedulerTest, OneRequestRunsFromItsPromptToItsLastToken) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 6, 3).ok());
  StepPlan plan = Step();
  ASSERT_THAT(plan.sequences, SizeIs(1));
  EXPECT_EQ(plan.sequences[0].num_tokens, 6);
  EXPECT_EQ(plan.sequences[0].num_blocks, 2);
  EXPECT_TRUE(plan.sequences[0].sample);
  plan = Step();
  EXPECT_EQ(plan.sequences[0].num_computed_tokens, 6);
  EXPECT_THAT(plan.tokens, ElementsAre(tokens_[1][0]));
  Step();
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(finish_[1], FinishReason::kLength);
  EXPECT_EQ(scheduler_->num_free_blocks(), 8);
}

TEST_F(SchedulerTest, ALongPromptIsComputedInChunksBesideDecodes) {
  Make(SmallEngine(), {.max_step_tokens = 5});
  ASSERT_TRUE(Add(1, 3, 5).ok());
  ASSERT_TRUE(Add(2, 9, 1).ok());
  EXPECT_THAT(NumTokens(Step()), ElementsAre(3, 2));
  EXPECT_THAT(NumTokens(Step()), ElementsAre(1, 4));
  const StepPlan plan = Step();
  EXPECT_THAT(NumTokens(plan), ElementsAre(1, 3));
  EXPECT_TRUE(plan.sequences[1].sample);
  RunToEnd();
}

// ---- at the door ----

TEST_F(SchedulerTest, RefusesWhatCanNeverRunWithTheNumbers) {
  Make(SmallEngine());  // 8 blocks of 4, 1000 tokens
  const auto refusal = [&](const Request& request) {
    const absl::Status status = Add(request);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  Request request = MakeRequest(1, 0, 1);
  EXPECT_THAT(refusal(request), HasSubstr("prompt has no tokens"));
  request = MakeRequest(1, 5, 0);
  EXPECT_THAT(refusal(request), HasSubstr("max_new_tokens is 0"));
  request = MakeRequest(1, 5, 3);
  request.min_new_tokens = 4;
  EXPECT_THAT(refusal(request), HasSubstr("min_new_tokens is 4"));
  request.min_new_tokens = -1;
  EXPECT_THAT(refusal(request), HasSubstr("min_new_tokens is -1"));
  request = MakeRequest(1, 900, 101);
  EXPECT_THAT(refusal(request), HasSubstr("together 1001; the model accepts 1000"));
  request = MakeRequest(1, 1, std::numeric_limits<int32_t>::max());
  EXPECT_THAT(refusal(request), HasSubstr("together 2147483648; the model accepts 1000"));
  request = MakeRequest(1, 30, 4);
  EXPECT_THAT(refusal(request), HasSubstr("room for 32 (8 blocks of 4)"));
  request = MakeRequest(1, 5, 1);
  request.prompt[3] = 100;
  EXPECT_THAT(refusal(request), HasSubstr("prompt[3] is token 100; the vocabulary has 100"));
  request = MakeRequest(1, 5, 1);
  request.stop_token_ids = {7, -1};
  EXPECT_THAT(refusal(request), HasSubstr("stop_token_ids[1] is token -1"));
  EXPECT_TRUE(scheduler_->idle());
}

TEST_F(SchedulerTest, TakesWhatJustFits) {
  EngineInfo info = SmallEngine();
  Make(info);
  ASSERT_TRUE(Add(1, 30, 3).ok());  // the 33rd token is never computed
  RunToEnd();
  info.max_model_len = 20;
  Make(info);
  ASSERT_TRUE(Add(1, 15, 5).ok());
  RunToEnd();
  EXPECT_THAT(tokens_[1], SizeIs(5));
}

TEST_F(SchedulerTest, RefusesBeyondMaxWaitingButNotForThePreempted) {
  Make(SmallEngine(), {.max_running = 2, .max_waiting = 2});
  ASSERT_TRUE(Add(1, 12, 12).ok());
  ASSERT_TRUE(Add(2, 12, 12).ok());
  const absl::Status full = Add(3, 4, 1);
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_waiting is 2"));
  Step();
  while (scheduler_->num_preemptions() == 0) Step();
  EXPECT_EQ(scheduler_->num_waiting(), 1);
  EXPECT_TRUE(Add(4, 4, 1).ok());
  EXPECT_TRUE(Add(5, 4, 1).ok());
  EXPECT_EQ(Add(6, 4, 1).code(), absl::StatusCode::kResourceExhausted);
  RunToEnd();
}

TEST_F(SchedulerTest, RefusesAnIdThatIsInUse) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 5, 2).ok());
  EXPECT_EQ(scheduler_->Add(MakeRequest(1, 5, 2)).code(), absl::StatusCode::kAlreadyExists);
  RunToEnd();
  EXPECT_TRUE(Add(MakeRequest(1, 5, 2)).ok());
}

// ---- the policy ----

TEST_F(SchedulerTest, TheOldestRunningComeFirstWhenTheBudgetIsShort) {
  Make(SmallEngine(), {.max_step_tokens = 2});
  for (RequestId id : {1, 2, 3}) ASSERT_TRUE(Add(id, 1, 3).ok());
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  EXPECT_THAT(Ids(Step()), ElementsAre(3));
}

TEST_F(SchedulerTest, AdmitsByPriorityThenByArrival) {
  Make(SmallEngine(), {.max_running = 1});
  const int32_t priorities[] = {0, 5, -3, 5};
  for (RequestId id = 1; id <= 4; ++id) {
    Request request = MakeRequest(id, 4, 1);
    request.priority = priorities[id - 1];
    ASSERT_TRUE(Add(request).ok());
  }
  std::vector<RequestId> order;
  while (!scheduler_->idle()) order.push_back(Ids(Step())[0]);
  EXPECT_THAT(order, ElementsAre(2, 4, 1, 3));
}

TEST_F(SchedulerTest, NobodyOvertakesTheNextInLine) {
  Make(SmallEngine());  // 8 blocks
  ASSERT_TRUE(Add(1, 20, 2).ok());
  ASSERT_TRUE(Add(2, 16, 1).ok());  // 4 blocks, 3 are left
  ASSERT_TRUE(Add(3, 4, 1).ok());   // would fit
  EXPECT_THAT(Ids(Step()), ElementsAre(1));
  EXPECT_THAT(Ids(Step()), ElementsAre(1));
  EXPECT_THAT(Ids(Step()), ElementsAre(2, 3));
}

TEST_F(SchedulerTest, NobodyTakesTheRoomOfAPromptUnderWay) {
  Make(SmallEngine(), {.max_step_tokens = 12});
  ASSERT_TRUE(Add(1, 24, 1).ok());  // 6 blocks, in two chunks
  ASSERT_TRUE(
      Add(2, 12, 1).ok());  // 3 blocks: 5 are free after the first chunk, but 3 of them needed
  EXPECT_THAT(Ids(Step()), ElementsAre(1));
  EXPECT_EQ(scheduler_->num_free_blocks(), 5);
  EXPECT_THAT(Ids(Step()), ElementsAre(1));
  EXPECT_THAT(Ids(Step()), ElementsAre(2));
  EXPECT_EQ(scheduler_->num_preemptions(), 0);
}

TEST_F(SchedulerTest, TheEnginesLimitsHoldBesideTheConfigured) {
  EngineInfo info = SmallEngine();
  info.max_step_tokens = 6;
  info.max_sequences = 2;
  Make(info, {.max_step_tokens = 100, .max_running = 100});
  for (RequestId id : {1, 2, 3}) ASSERT_TRUE(Add(id, 4, 3).ok());
  EXPECT_THAT(NumTokens(Step()), ElementsAre(4, 2));
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  RunToEnd();
}

// 8 blocks; three sequences of 8 tokens whose third blocks are two too many.
class PreemptionTest : public SchedulerTest {
 protected:
  void Start(std::vector<int32_t> priorities, int max_new_tokens = 6) {
    Make(SmallEngine());
    for (size_t i = 0; i < priorities.size(); ++i) {
      Request request = MakeRequest(i + 1, 8, max_new_tokens);
      request.priority = priorities[i];
      ASSERT_TRUE(Add(request).ok());
    }
    EXPECT_THAT(Step().sequences, SizeIs(priorities.size()));
  }
};

TEST_F(PreemptionTest, TheYoungestGoes) {
  Start({0, 0, 0});
  EXPECT_THAT(Ids(Schedule()), ElementsAre(1, 2));
  EXPECT_EQ(scheduler_->num_preemptions(), 1);
  EXPECT_EQ(scheduler_->num_waiting(), 1);
}

TEST_F(PreemptionTest, TheLowestPriorityGoesBeforeTheYoungest) {
  Start({1, 0, 1});
  EXPECT_THAT(Ids(Schedule()), ElementsAre(1, 3));
}

TEST_F(PreemptionTest, AnOlderOneOfLowPriorityLosesItsShareOfTheStep) {
  // The oldest had its share, then the third needed a block more than there are.
  Start({0, 1, 1});
  const StepPlan plan = Schedule();
  EXPECT_THAT(Ids(plan), ElementsAre(2, 3));
  EXPECT_THAT(plan.tokens, SizeIs(2));
}

TEST_F(SchedulerTest, TheShareOfThePreemptedGoesToThoseAfterIt) {
  EngineInfo info = SmallEngine();
  info.num_blocks = 7;
  Make(info, {.max_step_tokens = 3});
  ASSERT_TRUE(Add(1, 2, 12).ok());
  Step();
  Request decoding = MakeRequest(2, 1, 12);
  Request prompt = MakeRequest(3, 16, 1);
  decoding.priority = prompt.priority = 1;
  ASSERT_TRUE(Add(decoding).ok());
  ASSERT_TRUE(Add(prompt).ok());
  EXPECT_THAT(NumTokens(Step()), ElementsAre(1, 1, 1));
  StepPlan plan;
  do {
    plan = Step();
  } while (scheduler_->num_preemptions() == 0);
  EXPECT_THAT(Ids(plan), ElementsAre(2, 3));
  EXPECT_THAT(NumTokens(plan), ElementsAre(1, 2));
  RunToEnd();
}

TEST_F(PreemptionTest, NobodyIsAdmittedInThatStepNotEvenWhoComesFirst) {
  Start({0, 0, 0});
  Request urgent = MakeRequest(4, 2, 1);
  urgent.priority = 1;
  ASSERT_TRUE(Add(urgent).ok());  // the two blocks of the preempted would do
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2));
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2, 4));
  RunToEnd();
}

TEST_F(PreemptionTest, ThePreemptedIsNextOfItsPriority) {
  Start({0, 0, 0});
  ASSERT_TRUE(Add(4, 2, 1).ok());
  Finish(Schedule());
  EXPECT_EQ(scheduler_->num_waiting(), 2);
  std::vector<RequestId> order;
  while (!scheduler_->idle()) {
    for (RequestId id : Ids(Step())) {
      if (id > 2) order.push_back(id);
    }
  }
  EXPECT_EQ(order.front(), 3u);
  EXPECT_EQ(finish_[3], FinishReason::kLength);  // and the oracle's tokens: Finish() compares
}

TEST_F(PreemptionTest, ThePreemptedFindsItsBlocksInTheCacheAndStartsOnce) {
  Start({0, 0, 0}, /*max_new_tokens=*/3);
  int starts = 0;
  StepPlan plan;
  do {
    plan = Step();
    starts += static_cast<int>(scheduler_->started().size());
  } while (Ids(plan).back() != 3);
  EXPECT_EQ(starts, 0);
  EXPECT_EQ(plan.sequences.back().num_computed_tokens, 8);  // two full blocks
  EXPECT_EQ(scheduler_->prompt_tokens(), 24);
  EXPECT_EQ(scheduler_->cached_tokens(), 0);  // counts first admissions
}

// ---- limits on what is drawn ----

TEST_F(SchedulerTest, StopTokensAreSuppressedBeforeMinNewTokensAndEndAfter) {
  Make(SmallEngine());
  Request request = MakeRequest(1, 9, 12);
  for (TokenId token = 0; token < 60; ++token) request.stop_token_ids.push_back(token);
  request.min_new_tokens = 3;
  ASSERT_TRUE(Add(request).ok());
  for (int i = 0; i < 3; ++i) {
    const StepPlan plan = Step();
    EXPECT_EQ(plan.sequences[0].num_suppressed, 60);
    EXPECT_EQ(plan.suppressed, request.stop_token_ids);
    EXPECT_EQ(finish_[1], FinishReason::kNone);
  }
  while (!scheduler_->idle()) EXPECT_THAT(Step().suppressed, IsEmpty());
  EXPECT_EQ(finish_[1], FinishReason::kStop);
  EXPECT_LT(tokens_[1].back(), 60);
}

TEST_F(SchedulerTest, NothingIsSuppressedInTheMiddleOfAPrompt) {
  Make(SmallEngine(), {.max_step_tokens = 5});
  Request request = MakeRequest(1, 9, 2);
  request.stop_token_ids = {1};
  request.min_new_tokens = 1;
  ASSERT_TRUE(Add(request).ok());
  EXPECT_THAT(Step().suppressed, IsEmpty());
  EXPECT_THAT(Step().suppressed, ElementsAre(1));
}

TEST_F(SchedulerTest, AStopTokenThatIsTheLastIsAStop) {
  Make(SmallEngine());
  Request request = MakeRequest(1, 9, 1);
  request.stop_token_ids = engine_->Expected(request);
  ASSERT_TRUE(Add(request).ok());
  RunToEnd();
  EXPECT_EQ(finish_[1], FinishReason::kStop);
}

// ---- cancel ----

TEST_F(SchedulerTest, CancelForgetsWaitingAndRunning) {
  Make(SmallEngine(), {.max_running = 1});
  ASSERT_TRUE(Add(1, 9, 5).ok());
  ASSERT_TRUE(Add(2, 9, 5).ok());
  Step();
  scheduler_->Cancel(2);
  scheduler_->CheckInvariants();
  EXPECT_EQ(scheduler_->num_waiting(), 0);
  EXPECT_EQ(scheduler_->num_not_started(), 0);
  scheduler_->Cancel(1);
  scheduler_->CheckInvariants();
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(scheduler_->num_free_blocks(), 8);
  scheduler_->Cancel(1);
  scheduler_->Cancel(77);
  EXPECT_TRUE(Step().empty());
}

TEST_F(SchedulerTest, ACancelWithinAStepKeepsItsBlocksUntilTheStepIsOver) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 9, 5).ok());
  ASSERT_TRUE(Add(2, 5, 5).ok());
  const StepPlan plan = Schedule();
  scheduler_->Cancel(1);
  scheduler_->CheckInvariants();
  EXPECT_EQ(scheduler_->num_free_blocks(), 3);  // the engine writes the others
  Finish(plan);
  EXPECT_THAT(tokens_[1], IsEmpty());
  EXPECT_THAT(tokens_[2], SizeIs(1));
  EXPECT_EQ(scheduler_->num_free_blocks(), 6);
  RunToEnd();
}

TEST_F(PreemptionTest, CancelForgetsThePreempted) {
  Start({0, 0, 0});
  Finish(Schedule());
  scheduler_->Cancel(3);
  scheduler_->CheckInvariants();
  EXPECT_EQ(scheduler_->num_waiting(), 0);
  RunToEnd();
}

// ---- failures ----

TEST_F(SchedulerTest, AResultThatDoesNotFitThePlanIsRefusedAndChangesNothing) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 9, 5).ok());
  const StepPlan plan = Schedule();
  EXPECT_EQ(scheduler_->Update(plan, {}).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(scheduler_->Update(plan, {{1, 2}}).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(scheduler_->Update(plan, {{100}}).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(scheduler_->Update(plan, {{-1}}).status().code(), absl::StatusCode::kInternal);
  scheduler_->CheckInvariants();
  Finish(plan);
  RunToEnd();
}

TEST_F(SchedulerTest, AbortFailsThePlanRestartsTheOthersAndDropsTheCache) {
  Make(SmallEngine(), {.max_step_tokens = 5});
  ASSERT_TRUE(Add(1, 4, 9).ok());
  ASSERT_TRUE(Add(2, 12, 1).ok());
  Step();
  ASSERT_TRUE(Add(3, 4, 1).ok());
  StepPlan plan = Schedule();  // all five tokens for 1 and 2
  ASSERT_THAT(Ids(plan), ElementsAre(1, 2));
  scheduler_->Cancel(1);
  const absl::Status error = absl::UnavailableError("gone");
  const std::vector<SequenceEvent> events = scheduler_->Abort(plan, error);
  scheduler_->CheckInvariants();
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_EQ(events[0].id, 2u);
  EXPECT_EQ(events[0].kind, SequenceEvent::Kind::kFailed);
  EXPECT_EQ(events[0].finish, FinishReason::kError);
  EXPECT_EQ(events[0].error, error);
  EXPECT_EQ(scheduler_->num_free_blocks(), 8);
  ASSERT_TRUE(Add(MakeRequest(2, 12, 1)).ok());
  plan = Schedule();
  EXPECT_THAT(Ids(plan), ElementsAre(3, 2));
  EXPECT_EQ(plan.sequences[1].num_computed_tokens, 0);  // what it had cached is gone
  Finish(plan);
  RunToEnd();
}

TEST_F(SchedulerTest, RestartLetsAllBeComputedAgainFromTheirTokens) {
  Make(SmallEngine(), {.max_step_tokens = 5});
  ASSERT_TRUE(Add(1, 4, 9).ok());
  ASSERT_TRUE(Add(2, 12, 2).ok());
  Step();
  ASSERT_TRUE(Add(3, 4, 1).ok());
  const StepPlan plan = Schedule();  // all five tokens for 1 and 2
  EXPECT_THAT(scheduler_->Restart(plan, absl::AbortedError("gone")), IsEmpty());
  scheduler_->CheckInvariants();
  EXPECT_EQ(scheduler_->num_running(), 0);
  EXPECT_EQ(scheduler_->num_waiting(), 3);
  EXPECT_EQ(scheduler_->num_not_started(), 1);
  EXPECT_EQ(scheduler_->num_free_blocks(), 8);
  EXPECT_EQ(scheduler_->num_restarts(), 1);
  EXPECT_EQ(scheduler_->num_recovered(), 2);
  const StepPlan again = Step();
  EXPECT_THAT(scheduler_->started(), IsEmpty());  // they have been told
  EXPECT_THAT(Ids(again), ElementsAre(1));
  EXPECT_THAT(again.tokens, SizeIs(5));  // the prompt and what was drawn
  EXPECT_EQ(again.sequences[0].num_computed_tokens, 0);
  RunToEnd();  // with the oracle's tokens: Finish() compares
}

TEST_F(SchedulerTest, WhoLosesMoreStepsThanMaxRecoveriesFails) {
  Make(SmallEngine(), {.max_running = 1, .max_recoveries = 1});
  ASSERT_TRUE(Add(1, 4, 9).ok());
  ASSERT_TRUE(Add(2, 4, 2).ok());
  const absl::Status lost = absl::AbortedError("rank 3: gone");
  // A step that was never begun is no loss of anybody's.
  const absl::Status not_begun = absl::CancelledError("another group");
  for (int i = 0; i < 5; ++i) {
    EXPECT_THAT(scheduler_->Restart(Schedule(), not_begun), IsEmpty());
  }
  EXPECT_THAT(scheduler_->Restart(Schedule(), lost), IsEmpty());
  Step();
  const std::vector<SequenceEvent> events = scheduler_->Restart(Schedule(), lost);
  scheduler_->CheckInvariants();
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_EQ(events[0].id, 1u);
  EXPECT_EQ(events[0].kind, SequenceEvent::Kind::kFailed);
  EXPECT_EQ(events[0].finish, FinishReason::kError);
  EXPECT_EQ(events[0].error.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(events[0].error.message()),
              HasSubstr("max_recoveries is 1; the last one: rank 3: gone"));
  EXPECT_THAT(Ids(Step()), ElementsAre(2));  // it has lost none
  RunToEnd();
}

TEST_F(SchedulerTest, WhoIsCancelledInALostStepIsForgotten) {
  Make(SmallEngine());
  ASSERT_TRUE(Add(1, 4, 9).ok());
  ASSERT_TRUE(Add(2, 4, 2).ok());
  const StepPlan plan = Schedule();
  scheduler_->Cancel(1);
  EXPECT_THAT(scheduler_->Restart(plan, absl::AbortedError("gone")), IsEmpty());
  scheduler_->CheckInvariants();
  EXPECT_EQ(scheduler_->num_waiting(), 1);
  EXPECT_EQ(scheduler_->num_recovered(), 1);
  RunToEnd();
}

TEST_F(SchedulerTest, FailAllEndsEveryRequest) {
  Make(SmallEngine(), {.max_running = 1});
  ASSERT_TRUE(Add(1, 9, 5).ok());
  ASSERT_TRUE(Add(2, 9, 5).ok());
  Step();
  const auto events = scheduler_->FailAll(absl::UnavailableError("the end"));
  EXPECT_THAT(events, SizeIs(2));
  scheduler_->CheckInvariants();
  EXPECT_TRUE(scheduler_->idle());
  EXPECT_EQ(scheduler_->num_not_started(), 0);
}

}  // namespace
}  // namespace latentd
