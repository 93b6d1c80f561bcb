#ifndef LATENTD_SERVER_BENCH_SIMULATED_ENGINE_H_
#define LATENTD_SERVER_BENCH_SIMULATED_ENGINE_H_

#include <algorithm>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "server/bench/cluster_model.h"

namespace latentd {

// A cluster that computes nothing and takes as long as ClusterModel says, by a clock of its own.
// The tokens are no text, but the same for the same plan. Not thread-safe.
class SimulatedEngine : public Engine {
 public:
  // `model` must outlive it.
  explicit SimulatedEngine(const ClusterModel& model) : model_(model) {}

  EngineInfo info() const override { return model_.info(); }
  // Moves the clock to the step's end. INVALID_ARGUMENT for a dp_rank or a token's place that the
  // cluster has not.
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;

  double now_s() const { return now_s_; }
  // Nothing is to be done before `time_s`.
  void WaitUntil(double time_s) { now_s_ = std::max(now_s_, time_s); }
  const StepCost& last_step() const { return last_step_; }

 private:
  const ClusterModel& model_;
  double now_s_ = 0;
  StepCost last_step_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_SIMULATED_ENGINE_H_
