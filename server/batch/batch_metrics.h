#ifndef LATENTD_SERVER_BATCH_BATCH_METRICS_H_
#define LATENTD_SERVER_BATCH_BATCH_METRICS_H_

#include <cstdint>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"
#include "server/histogram.h"
#include "server/metrics_writer.h"

namespace latentd {

// What /metrics says of batch jobs. A scrape writes what was found last: nothing waits for the
// store. Thread-safe.
class BatchMetrics {
 public:
  BatchMetrics();

  // BatchStore's on_commit and on_change; do not block.
  void OnCommit(absl::Duration time) { commit_.Observe(absl::ToDoubleSeconds(time)); }
  void OnChange();

  // As long as it lives, a thread of its own asks the store after changes, once in a period at
  // most, and seldom without one. Both must outlive it.
  class Watch {
   public:
    Watch(BatchMetrics* metrics, const BatchStore* store, absl::Duration period = absl::Seconds(1));
    ~Watch();

   private:
    void Loop();

    BatchMetrics* const metrics_;
    const BatchStore* const store_;
    const absl::Duration period_;
    std::thread thread_;
  };

  // `num_running`: items that run now. `now` is for what is so old. Does not block.
  void Write(int64_t num_running, MetricsWriter* out, absl::Time now = absl::Now()) const;

 private:
  Histogram commit_;
  mutable absl::Mutex mutex_;
  StoreStats stats_ ABSL_GUARDED_BY(mutex_);
  bool changed_ ABSL_GUARDED_BY(mutex_) = false;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_METRICS_H_
