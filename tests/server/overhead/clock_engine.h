#ifndef LATENTD_TESTS_SERVER_OVERHEAD_CLOCK_ENGINE_H_
#define LATENTD_TESTS_SERVER_OVERHEAD_CLOCK_ENGINE_H_

#include <cstdint>

#include "absl/time/time.h"
#include "engine/engine.h"

namespace latentd {

// Tells in each token when it was made, so that a client knows how long it was under way. The clock
// is CLOCK_MONOTONIC, which the processes of one host share, in ticks of 50 us, and goes round.
class TokenClock {
 public:
  static constexpr absl::Duration kTick = absl::Microseconds(50);
  static constexpr int32_t kFirstToken =
      300;  // of deploy/demo-model: from here on words, not bytes
  static constexpr int32_t kNumTokens = 3700;  // goes round after 185 ms

  // What the sequence with that seed draws now; seeds make the sequences differ.
  static int32_t Now(uint64_t seed);
  // How long ago that was, modulo the round.
  static absl::Duration Age(int32_t token, uint64_t seed);
};

// An engine without compute whose steps begin at most once a period, as a model's would.
class ClockEngine : public Engine {
 public:
  // `period` 0: as fast as it can.
  ClockEngine(const EngineInfo& info, absl::Duration period) : info_(info), period_(period) {}

  EngineInfo info() const override { return info_; }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;

 private:
  const EngineInfo info_;
  const absl::Duration period_;
  absl::Time next_ = absl::InfinitePast();
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_OVERHEAD_CLOCK_ENGINE_H_
