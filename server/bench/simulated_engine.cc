#include "server/bench/simulated_engine.h"

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace latentd {

absl::StatusOr<StepResult> SimulatedEngine::Execute(const StepPlan& plan) {
  const EngineInfo info = model_.info();
  StepResult result;
  for (const SequenceStep& s : plan.sequences) {
    const int32_t end = s.num_computed_tokens + s.num_tokens;
    if (s.dp_rank < 0 || s.dp_rank >= info.num_dp_ranks || end > info.max_model_len) {
      return absl::InvalidArgumentError(absl::StrCat(
          "step ", plan.step, ": sequence ", s.id, " has ", end, " tokens on rank ", s.dp_rank,
          "; there are ", info.num_dp_ranks, " ranks and ", info.max_model_len, " tokens"));
    }
    if (s.sample) result.sampled.push_back(static_cast<TokenId>((s.id + end) % info.vocab_size));
  }
  last_step_ = model_.Cost(plan);
  now_s_ += last_step_.seconds();
  result.device =
      DeviceTimes{.idle_seconds = last_step_.leader,
                  .busy_seconds = last_step_.attention + last_step_.experts + last_step_.exchange};
  return result;
}

}  // namespace latentd
