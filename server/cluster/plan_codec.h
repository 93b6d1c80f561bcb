#ifndef LATENTD_SERVER_CLUSTER_PLAN_CODEC_H_
#define LATENTD_SERVER_CLUSTER_PLAN_CODEC_H_

#include <cstddef>
#include <string_view>

#include "absl/status/status.h"
#include "engine/step.h"

namespace latentd {

// Plans and results as bytes, for RankService. Little-endian; the arrays as they lie in memory, so
// that either way costs little more than a memcpy. The two ends are of one version of the program;
// the first byte says so once more.
//
// Decoding trusts nothing: what it accepts is what encoding gives for the same value, sizes that
// fit each other included. Whether the ids are in range is the engine's to check (PlanCheck).

size_t EncodedPlanSize(const StepPlan& plan);
void EncodePlan(const StepPlan& plan, char* out);  // EncodedPlanSize() bytes
// INVALID_ARGUMENT says what does not fit; `plan` is overwritten, and its memory used again.
absl::Status DecodePlan(std::string_view bytes, StepPlan* plan);

size_t EncodedResultSize(const StepResult& result);
void EncodeResult(const StepResult& result, char* out);  // EncodedResultSize() bytes
absl::Status DecodeResult(std::string_view bytes, StepResult* result);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_PLAN_CODEC_H_
