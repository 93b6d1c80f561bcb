#ifndef LATENTD_ENGINE_PLAN_SPLIT_H_
#define LATENTD_ENGINE_PLAN_SPLIT_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/step.h"

namespace latentd {

// INVALID_ARGUMENT when `plan` cannot be split: a dp_rank that is none of `num_ranks`, or counts of
// the sequences that are not the sizes of the arrays.
absl::Status CheckSplit(const StepPlan& plan, int32_t num_ranks);

// Each rank's share of `plan`: its own sequences in their order, and the shape that all ranks pad
// to. shares [num_ranks] is overwritten; its memory is used again.
// REQUIRES: CheckSplit(plan, num_ranks) is OK.
void SplitPlan(const StepPlan& plan, int32_t num_ranks, std::vector<StepPlan>* shares);

// The result of `plan` from the results of its shares. INTERNAL names the rank whose number of
// tokens does not fit. Device times are those of the rank that was busy longest.
//   results  [num_ranks]
absl::StatusOr<StepResult> MergeResults(const StepPlan& plan, absl::Span<const StepResult> results);

}  // namespace latentd

#endif  // LATENTD_ENGINE_PLAN_SPLIT_H_
