#ifndef LATENTD_SERVER_BATCH_BATCH_RUNNER_IMPL_H_
#define LATENTD_SERVER_BATCH_BATCH_RUNNER_IMPL_H_

#include <cstdint>
#include <deque>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/random/random.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/batch/batch_runner.h"
#include "server/batch/item_queue.h"

// Of the batch_runner*.cc alone.

namespace latentd {

using CallId = LocalCaller::CallId;

// An item that has met with so many bad ends is run alone.
inline constexpr int32_t kBadEndsBesideOthers = 2;

// An item that has a place.
struct Place {
  // kWaiting: to be begun (again); of this attempt nothing is written.
  // kStarting: its start is being written. kRunning: with the caller.
  enum class State { kWaiting, kStarting, kRunning };

  JobId job = 0;
  PendingItem item;
  State state = State::kWaiting;
  bool counted = false;  // in num_running

  bool alone() const { return item.attempts >= kBadEndsBesideOthers; }
  int64_t bytes() const { return static_cast<int64_t>(item.request.size()); }
  ItemStart start() const { return {.job = job, .index = item.index, .seed = item.seed}; }
};

// What has happened since the thread last looked.
struct Inbox {
  bool woken = false;  // by whatever it is
  bool draining = false;
  std::set<JobId> changed;
  std::vector<CallId> started;  // that is on stable storage
  std::vector<std::pair<CallId, absl::StatusOr<LocalResponse>>> ended;
  absl::Status store = absl::OkStatus();
};

class BatchRunner::Impl {
 public:
  Impl(BatchStore* store, LocalCaller* caller, Options options)
      : store_(store),
        caller_(caller),
        options_(std::move(options)),
        queue_(store, options_.max_ahead, options_.max_ahead_bytes),
        thread_([this] { Run(); }),
        purge_thread_([this] { PurgeNowAndThen(); }) {}

  ~Impl() {
    {
      absl::MutexLock lock(&mutex_);
      inbox_.woken = inbox_.draining = stopping_ = true;
    }
    thread_.join();
    purge_thread_.join();
    // The store's thread calls us until then.
    absl::MutexLock lock(&mutex_);
    const auto written = [this]()
                             ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return num_writes_ == 0; };
    mutex_.Await(absl::Condition(&written));
  }

  void OnChange(const std::vector<JobId>& jobs) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    inbox_.woken = true;
    inbox_.changed.insert(jobs.begin(), jobs.end());
  }

  int64_t num_running(JobId job) const ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    const auto it = num_running_.find(job);
    return it == num_running_.end() ? 0 : it->second;
  }

  int64_t num_running() const ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    int64_t sum = 0;
    for (const auto& [job, number] : num_running_) sum += number;
    return sum;
  }

  void StartDrain() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    inbox_.woken = inbox_.draining = true;
  }

 private:
  // ---- the thread ----
  void Run();
  Inbox Wait() ABSL_LOCKS_EXCLUDED(mutex_);

  void LoadJobs();
  void UpdateJob(JobId id);
  void Ending(JobId id);  // nothing more of it is begun; what runs is cancelled
  void ExpireJobs();
  void EndJob(JobId id, v1::JobState state, const std::string& reason);
  void FinalizeJobs();

  void OnStarted(CallId id);
  void OnEnded(CallId id, absl::StatusOr<LocalResponse> response);
  void OnBadEnd(CallId id, const ActiveJob& job, const absl::Status& error);
  void Succeed(const Place& place, LocalResponse response);
  void Fail(const Place& place, v1::ItemError error);
  void Return(Place* place);  // its start
  // Tries again, in a while.
  void Postpone(CallId id, absl::Duration delay);
  void Forget(CallId id);
  void LeaveActive(CallId id, Place* place);

  // Begins what there are places for: first what waits in one, then new items.
  void Begin();
  void BeginWaiting();
  void BeginNew(int64_t max_places);
  void Start(CallId id);
  // Hands what was done to the store.
  void Write() ABSL_LOCKS_EXCLUDED(mutex_);
  void Drain();
  // Nothing more is done when the store has failed. Whether it has not.
  bool Check(const absl::Status& status);
  std::vector<CallId> PlacesOf(JobId job) const;

  void PurgeNowAndThen() ABSL_LOCKS_EXCLUDED(mutex_);  // a thread of its own: it may take seconds

  // ---- any thread ----
  BatchStore::Done Counted(BatchStore::Done then) ABSL_LOCKS_EXCLUDED(mutex_);
  void CountRunning(JobId job, int64_t number) ABSL_LOCKS_EXCLUDED(mutex_);

  BatchStore* const store_;
  LocalCaller* const caller_;
  const Options options_;

  // The thread's.
  ItemQueue queue_;
  absl::flat_hash_map<CallId, Place> places_;
  int64_t bytes_ = 0;                                         // of their requests
  absl::btree_set<std::pair<absl::Time, CallId>> postponed_;  // waiting, until then
  std::deque<CallId> waiting_;                                // for their turn
  int64_t num_active_ = 0;                                    // starting or running
  CallId alone_ = 0;  // active, and shall be so alone; 0: none
  CallId last_id_ = 0;
  absl::Time pause_until_ = absl::InfinitePast();
  bool draining_ = false;
  bool stopped_ = false;  // the store has failed
  bool busy_ = true;      // there is something to do at once
  std::vector<ItemStart> starts_, returns_;
  std::vector<CallId> starting_;  // those of starts_
  std::vector<ItemEnd> ends_;
  std::vector<std::pair<JobId, std::string>> failed_fast_;  // jobs to end, and why
  absl::BitGen random_;

  mutable absl::Mutex mutex_;
  Inbox inbox_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t num_writes_ ABSL_GUARDED_BY(mutex_) = 0;  // asked for, not answered
  absl::flat_hash_map<JobId, int64_t> num_running_ ABSL_GUARDED_BY(mutex_);

  std::thread thread_, purge_thread_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_RUNNER_IMPL_H_
