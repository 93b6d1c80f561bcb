#ifndef LATENTD_TESTS_SCHEDULER_SHADOW_SCHEDULER_H_
#define LATENTD_TESTS_SCHEDULER_SHADOW_SCHEDULER_H_

#include <set>
#include <tuple>
#include <vector>

#include "engine/status.h"
#include "scheduler/scheduler.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {

// A scheduler and its engine beside others, which get the same requests but for the background
// ones. Every plan of the others has to begin with its plan.
class ShadowScheduler {
 public:
  ShadowScheduler(const SchedulerConfig& config, const FakeEngineOptions& engine,
                  const Scheduler::BlockOptions& blocks)
      : engine_(engine), scheduler_(config, engine.info, blocks) {}

  void Add(const Request& request) {
    if (request.background) {
      background_.insert(request.id);
    } else {
      LATENTD_CHECK(scheduler_.Add(request).ok());
    }
  }

  void Cancel(RequestId id) { scheduler_.Cancel(id); }

  // Plans a step. Whether `plan` is the same, background sequences aside.
  bool SchedulesAs(const StepPlan& plan) {
    plan_ = scheduler_.Schedule();
    return SharesOf(plan) == SharesOf(plan_);
  }

  // Runs the step.
  void EndStep() {
    if (plan_.empty()) return;
    const absl::StatusOr<StepResult> result = engine_.Execute(plan_);
    LATENTD_CHECK(result.ok() && scheduler_.Update(plan_, *result).ok());
  }

 private:
  // Who gets what, where.
  using Shares = std::vector<std::tuple<RequestId, int32_t, int32_t, int32_t>>;

  Shares SharesOf(const StepPlan& plan) const {
    Shares shares;
    for (const SequenceStep& step : plan.sequences) {
      if (background_.contains(step.id)) continue;
      shares.emplace_back(step.id, step.dp_rank, step.num_computed_tokens, step.num_tokens);
    }
    return shares;
  }

  FakeEngine engine_;
  Scheduler scheduler_;
  std::set<RequestId> background_;
  StepPlan plan_;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SCHEDULER_SHADOW_SCHEDULER_H_
