#include "tests/server/overhead/clock_engine.h"

#include <algorithm>
#include <chrono>

#include "absl/time/clock.h"

namespace latentd {
namespace {

int64_t Ticks() {
  return absl::FromChrono(std::chrono::steady_clock::now().time_since_epoch()) / TokenClock::kTick;
}

}  // namespace

int32_t TokenClock::Now(uint64_t seed) {
  return kFirstToken + static_cast<int32_t>((Ticks() + seed) % kNumTokens);
}

absl::Duration TokenClock::Age(int32_t token, uint64_t seed) {
  const int64_t then = token - kFirstToken;
  const int64_t now = static_cast<int64_t>((Ticks() + seed) % kNumTokens);
  return kTick * ((now - then + kNumTokens) % kNumTokens);
}

absl::StatusOr<StepResult> ClockEngine::Execute(const StepPlan& plan) {
  const absl::Time now = absl::Now();
  absl::SleepFor(next_ - now);
  next_ = std::max(next_ + period_, now);
  StepResult result;
  for (const SequenceStep& step : plan.sequences) {
    if (step.sample) result.sampled.push_back(TokenClock::Now(step.sampling.seed));
  }
  return result;
}

}  // namespace latentd
