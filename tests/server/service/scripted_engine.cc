#include "tests/server/service/scripted_engine.h"

#include <algorithm>
#include <utility>

namespace latentd {

absl::StatusOr<StepResult> ScriptedEngine::Execute(const StepPlan& plan) {
  absl::MutexLock lock(&mutex_);
  ++num_steps_;
  const auto may_go_on = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return !holding_ || num_allowed_ > 0;
  };
  mutex_.Await(absl::Condition(&may_go_on));
  if (holding_) --num_allowed_;
  if (absl::Status failure = std::exchange(failure_, absl::OkStatus()); !failure.ok()) {
    return failure;
  }
  StepResult result;
  for (const SequenceStep& step : plan.sequences) {
    if (!step.sample) continue;
    const int32_t position = step.num_computed_tokens + step.num_tokens;
    const int32_t first = first_position_.emplace(step.id, position).first->second;
    const size_t index = std::min<size_t>(position - first, script_.size() - 1);
    result.sampled.push_back(script_[index]);
    last_sampling_ = step.sampling;
  }
  return result;
}

void ScriptedEngine::Say(std::vector<TokenId> tokens) {
  absl::MutexLock lock(&mutex_);
  script_ = std::move(tokens);
}

void ScriptedEngine::Hold() {
  absl::MutexLock lock(&mutex_);
  holding_ = true;
  num_allowed_ = 0;
}

void ScriptedEngine::Allow(int num_steps) {
  absl::MutexLock lock(&mutex_);
  num_allowed_ += num_steps;
}

void ScriptedEngine::Release() {
  absl::MutexLock lock(&mutex_);
  holding_ = false;
}

void ScriptedEngine::AwaitStep(int64_t num_steps) {
  absl::MutexLock lock(&mutex_);
  const auto begun = [&]()
                         ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return num_steps_ >= num_steps; };
  mutex_.Await(absl::Condition(&begun));
}

int64_t ScriptedEngine::num_steps() const {
  absl::MutexLock lock(&mutex_);
  return num_steps_;
}

void ScriptedEngine::Fail(absl::Status status) {
  absl::MutexLock lock(&mutex_);
  failure_ = std::move(status);
}

SamplingParams ScriptedEngine::last_sampling() const {
  absl::MutexLock lock(&mutex_);
  return last_sampling_;
}

}  // namespace latentd
