#ifndef LATENTD_ENGINE_PLAN_CHECK_H_
#define LATENTD_ENGINE_PLAN_CHECK_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/engine.h"
#include "engine/step.h"

namespace latentd {

// Checks plans before they reach the kernels, where a wrong index would be undefined behaviour.
// Costs a few nanoseconds per token and block.
class PlanCheck {
 public:
  // `dp_rank`: of this engine's sequences.
  explicit PlanCheck(const EngineInfo& info, int32_t dp_rank = 0)
      : info_(info), dp_rank_(dp_rank), writer_(info.num_blocks, kNobody) {}

  // INVALID_ARGUMENT names the sequence, the field, the value and the limit.
  absl::Status Check(const StepPlan& plan);

 private:
  static constexpr int32_t kNobody = -1;

  absl::Status CheckSizes(const StepPlan& plan) const;
  absl::Status CheckSequence(const SequenceStep& sequence) const;
  absl::Status CheckIds(const StepPlan& plan) const;
  absl::Status CheckWrites(const StepPlan& plan);

  const EngineInfo info_;
  const int32_t dp_rank_;
  std::vector<int32_t> writer_;  // [num_blocks] which sequence of this plan writes the block
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_PLAN_CHECK_H_
