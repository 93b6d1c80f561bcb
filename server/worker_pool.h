#ifndef LATENTD_SERVER_WORKER_POOL_H_
#define LATENTD_SERVER_WORKER_POOL_H_

#include <cstddef>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace latentd {

// A few threads for what would hold up one of gRPC's: parsing, rendering and encoding a long prompt
// takes tens of milliseconds, and gRPC may have as few as two threads for all calls and health
// checks. Thread-safe.
class WorkerPool {
 public:
  // REQUIRES: num_threads >= 1.
  WorkerPool(int num_threads, size_t max_queued);
  // Runs what is queued, then ends the threads.
  ~WorkerPool();

  // False when `max_queued` tasks wait already; `task` is then not run. Never blocks.
  bool TryRun(std::function<void()> task);

 private:
  void Loop();

  const size_t max_queued_;
  absl::Mutex mutex_;
  std::deque<std::function<void()>> queue_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::thread> threads_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_WORKER_POOL_H_
