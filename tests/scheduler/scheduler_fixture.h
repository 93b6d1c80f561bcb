#ifndef LATENTD_TESTS_SCHEDULER_SCHEDULER_FIXTURE_H_
#define LATENTD_TESTS_SCHEDULER_SCHEDULER_FIXTURE_H_

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <vector>

#include "scheduler/scheduler.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {

inline constexpr int32_t kTestBlock = 4;  // tokens

inline EngineInfo SmallEngine() {
  return {.num_blocks = 8,
          .num_dp_ranks = 1,
          .max_step_tokens = 1000,
          .max_sequences = 1000,
          .max_model_len = 1000,
          .vocab_size = 100};
}

// A scheduler and an engine with blocks of 4 tokens, and short words for what tests do.
class SchedulerTest : public ::testing::Test {
 protected:
  void Make(const EngineInfo& info, const SchedulerConfig& config = {}) {
    engine_ =
        std::make_unique<FakeEngine>(FakeEngineOptions{.info = info, .block_size = kTestBlock});
    scheduler_ = std::make_unique<Scheduler>(config, info,
                                             Scheduler::BlockOptions{.block_size = kTestBlock});
    tokens_.clear();
    finish_.clear();
  }

  // A prompt of `num_tokens` that begins with no block of another `kind`'s.
  static std::vector<TokenId> Prompt(int num_tokens, TokenId kind) {
    std::vector<TokenId> prompt(num_tokens);
    for (int i = 0; i < num_tokens; ++i) prompt[i] = (kind * 7 + i) % 100;
    return prompt;
  }

  static Request MakeRequest(RequestId id, int num_tokens, int max_new_tokens) {
    Request request;
    request.id = id;
    request.prompt = Prompt(num_tokens, static_cast<TokenId>(id));
    request.max_new_tokens = max_new_tokens;
    return request;
  }

  absl::Status Add(const Request& request) {
    const absl::Status status = scheduler_->Add(request);
    if (status.ok()) requests_[request.id] = request;
    return status;
  }
  absl::Status Add(RequestId id, int num_tokens, int max_new_tokens) {
    return Add(MakeRequest(id, num_tokens, max_new_tokens));
  }

  StepPlan Schedule() {
    StepPlan plan = scheduler_->Schedule();
    scheduler_->CheckInvariants();
    return plan;
  }

  void Finish(const StepPlan& plan) {
    const absl::StatusOr<StepResult> result = engine_->Execute(plan);
    ASSERT_TRUE(result.ok()) << result.status();
    const auto events = scheduler_->Update(plan, *result);
    ASSERT_TRUE(events.ok()) << events.status();
    scheduler_->CheckInvariants();
    for (const SequenceEvent& event : *events) {
      tokens_[event.id].push_back(event.token);
      finish_[event.id] = event.finish;
      if (event.finish == FinishReason::kNone) continue;
      EXPECT_EQ(tokens_[event.id], engine_->Expected(requests_[event.id])) << event.id;
    }
  }

  // One step; the plan it ran.
  StepPlan Step() {
    StepPlan plan = Schedule();
    if (!plan.empty()) Finish(plan);
    return plan;
  }

  void RunToEnd() {
    for (int i = 0; i < 10000 && !scheduler_->idle(); ++i) Step();
    EXPECT_TRUE(scheduler_->idle());
  }

  static std::vector<RequestId> Ids(const StepPlan& plan) {
    std::vector<RequestId> ids;
    for (const SequenceStep& step : plan.sequences) ids.push_back(step.id);
    return ids;
  }

  static std::vector<int32_t> NumTokens(const StepPlan& plan) {
    std::vector<int32_t> num_tokens;
    for (const SequenceStep& step : plan.sequences) num_tokens.push_back(step.num_tokens);
    return num_tokens;
  }

  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
  std::map<RequestId, Request> requests_;
  std::map<RequestId, std::vector<TokenId>> tokens_;
  std::map<RequestId, FinishReason> finish_;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SCHEDULER_SCHEDULER_FIXTURE_H_
