#ifndef LATENTD_SERVER_BATCH_CHANGE_HUB_H_
#define LATENTD_SERVER_BATCH_CHANGE_HUB_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "server/batch/batch_store.h"

namespace latentd {

// Who wants to know of a job's changes.
class ChangeListener {
 public:
  virtual ~ChangeListener() = default;
  // By the store's writing thread; must not block.
  virtual void OnJobChanged() = 0;
};

// Passes BatchStore::Options::on_change on to those who watch a job. Must outlive the store.
// Thread-safe, and nothing blocks.
class ChangeHub {
 public:
  // Until the listener is gone.
  void Subscribe(JobId job, std::weak_ptr<ChangeListener> listener);
  void Notify(const std::vector<JobId>& jobs);

 private:
  absl::Mutex mutex_;
  size_t num_kept_ ABSL_GUARDED_BY(mutex_) = 0;  // jobs, when the last ones were forgotten
  absl::flat_hash_map<JobId, std::vector<std::weak_ptr<ChangeListener>>> listeners_
      ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_CHANGE_HUB_H_
