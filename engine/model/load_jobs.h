#ifndef LATENTD_ENGINE_MODEL_LOAD_JOBS_H_
#define LATENTD_ENGINE_MODEL_LOAD_JOBS_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/weights.h"

namespace latentd {

inline constexpr uint64_t kLoadJobBytes = 16 << 20;  // a good size of one job

struct LoadJob {
  uint64_t bytes = 0;
  std::function<absl::Status()> run;
};

// Runs the jobs on several threads and reports the bytes done from the calling one. Returns the
// error of one of those that failed; the jobs that had not begun by then are left out.
absl::Status RunLoadJobs(const std::vector<LoadJob>& jobs, const LoadProgress& progress);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_LOAD_JOBS_H_
