#include "engine/model/load_jobs.h"

#include <algorithm>
#include <atomic>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace latentd {
namespace {

constexpr unsigned kMaxThreads = 16;  // enough for any disk
constexpr absl::Duration kReportInterval = absl::Milliseconds(100);

class LoadRun {
 public:
  explicit LoadRun(const std::vector<LoadJob>& jobs) : jobs_(jobs) {}

  // What one thread does.
  void Work() {
    for (size_t i = next_++; i < jobs_.size(); i = next_++) {
      const absl::Status status = jobs_[i].run();
      absl::MutexLock lock(&mutex_);
      if (!status.ok()) {
        status_.Update(status);
        next_ = jobs_.size();
      }
      done_bytes_ += jobs_[i].bytes;
    }
    absl::MutexLock lock(&mutex_);
    ++num_finished_;
  }

  // Reports until `num_threads` threads have finished.
  absl::Status Watch(size_t num_threads, const LoadProgress& progress) {
    uint64_t total_bytes = 0;
    for (const LoadJob& job : jobs_) total_bytes += job.bytes;
    uint64_t reported_bytes = UINT64_MAX;
    const auto finished = [this, num_threads]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return num_finished_ == num_threads;
    };
    for (bool done = false; !done;) {
      uint64_t bytes = 0;
      absl::Status status;
      {
        absl::MutexLock lock(&mutex_);
        done = mutex_.AwaitWithTimeout(absl::Condition(&finished), kReportInterval);
        bytes = done_bytes_;
        status = status_;
      }
      if (done && !status.ok()) return status;
      // The total is reported once, at the end.
      const bool news = done || (bytes != reported_bytes && bytes < total_bytes);
      if (progress && news) progress(done ? total_bytes : bytes, total_bytes);
      reported_bytes = bytes;
    }
    return absl::OkStatus();
  }

 private:
  const std::vector<LoadJob>& jobs_;
  std::atomic<size_t> next_ = 0;

  absl::Mutex mutex_;
  absl::Status status_ ABSL_GUARDED_BY(mutex_);
  uint64_t done_bytes_ ABSL_GUARDED_BY(mutex_) = 0;
  size_t num_finished_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

absl::Status RunLoadJobs(const std::vector<LoadJob>& jobs, const LoadProgress& progress) {
  LoadRun run(jobs);
  const size_t num_threads =
      std::min<size_t>(std::clamp(std::thread::hardware_concurrency(), 1u, kMaxThreads),
                       std::max<size_t>(jobs.size(), 1));
  std::vector<std::jthread> threads;
  for (size_t i = 0; i < num_threads; ++i) threads.emplace_back([&run] { run.Work(); });
  return run.Watch(num_threads, progress);
}

}  // namespace latentd
