#ifndef LATENTD_SERVER_BATCH_BATCH_RUNNER_H_
#define LATENTD_SERVER_BATCH_BATCH_RUNNER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"
#include "server/local_caller.h"

namespace latentd {

// Runs the items of the store's jobs: one thread between the store and the engine's front.
//
// It keeps a bounded number of items with the caller and reads a bounded number ahead, however
// large the jobs are. Of the jobs with the highest priority the one that has the fewest items
// running is served next: jobs of the same priority hold the same number of the engine's seats. A
// start is on stable storage before its item runs, so a crash is counted against it.
//
// How a run ends, and what follows:
//   a response                     SUCCEEDED
//   an error of the request        FAILED, with it: the same would come again
//   an error of the engine         tried again, after a while, until max_attempts_per_item have
//   been
//                                  begun: FAILED, reason ATTEMPTS_EXHAUSTED. From the third attempt
//                                  on an item runs alone.
//   no engine at present           nobody's fault (loading, drain, a full queue): the start is
//   taken
//                                  back, and tried again after a while
// It also ends jobs: at their expire_time, after a failure of a fail_fast one; brings FINALIZING
// and CANCELLING ones to their end, and purges what the store keeps too long.
//
// When the store has failed nothing more is begun, and what runs is cancelled. Thread-safe.
class BatchRunner {
 public:
  struct Options {
    int32_t max_running = 0;  // items with the caller at once; 0: its capacity and an eighth
    int64_t max_running_bytes = 64 << 20;  // of requests, likewise; but one item always
    int32_t max_ahead = 256;               // items that a job has read ahead
    int64_t max_ahead_bytes = 32 << 20;    // of requests read ahead, all jobs together
    absl::Duration retry_delay =
        absl::Seconds(1);  // before an item's second try; then twice as long
    absl::Duration max_retry_delay = absl::Minutes(1);
    absl::Duration purge_interval = absl::Minutes(1);
    absl::Duration upload_ttl = absl::Hours(24);  // without an addition
    std::function<absl::Time()> now = absl::Now;
  };

  // Both must outlive it. Starts the thread, which begins with the jobs that are under way.
  BatchRunner(BatchStore* store, LocalCaller* caller, Options options);
  // Drains, and ends the thread. The store is no longer used; it may have writes of the runner's on
  // their way.
  ~BatchRunner();

  BatchRunner(const BatchRunner&) = delete;
  BatchRunner& operator=(const BatchRunner&) = delete;

  // BatchStore::Options::on_change: these jobs have changed. Does not block.
  void OnChange(const std::vector<JobId>& jobs);

  // Items of a job that run now: what Job.counts.running says, and pending has too many.
  int64_t num_running(JobId job) const;
  int64_t num_running() const;  // of all jobs

  // From now on nothing is begun; what runs is cancelled, and is pending again as if it had never
  // been begun. Does not block; num_running() is 0 once that is written.
  void StartDrain();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_RUNNER_H_
