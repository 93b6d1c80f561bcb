#include "server/batch/batch_runner.h"

#include <algorithm>
#include <deque>
#include <set>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/random/random.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "engine/status.h"
#include "server/batch/item_queue.h"
#include "server/batch/run_end.h"
#include "server/log.h"
#include "server/status.h"

namespace latentd {
namespace {

using CallId = LocalCaller::CallId;

// An item that has met with so many bad ends is run alone.
constexpr int32_t kBadEndsBesideOthers = 2;
// How often a caller that takes no calls is looked at.
constexpr absl::Duration kIdleInterval = absl::Milliseconds(200);
// Items that are marked at a time when a job ends.
constexpr int64_t kFinalizedAtOnce = 2000;

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

// A call of the caller's that runs the item. INVALID_ARGUMENT when it is none.
absl::StatusOr<LocalRequest> RequestOf(const PendingItem& item) {
  v1::BatchItem proto;
  if (proto.ParseFromString(item.request)) {
    if (proto.has_chat()) return LocalRequest(std::move(*proto.mutable_chat()));
    if (proto.has_complete()) return LocalRequest(std::move(*proto.mutable_complete()));
  }
  return MakeError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                   "the item is no BatchItem with a request");
}

}  // namespace

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

// ---- the loop ----------------------------------------------------------------------------------

void BatchRunner::Impl::Run() {
  LoadJobs();
  while (true) {
    Inbox inbox = Wait();
    busy_ = false;
    if (!inbox.store.ok()) Check(inbox.store);
    for (const JobId id : inbox.changed) UpdateJob(id);
    for (const CallId id : inbox.started) OnStarted(id);
    for (auto& [id, response] : inbox.ended) OnEnded(id, std::move(response));
    if (inbox.draining) Drain();
    ExpireJobs();
    Begin();
    Write();
    FinalizeJobs();
    if (!draining_ || !places_.empty()) continue;
    absl::MutexLock lock(&mutex_);
    if (stopping_) return;
  }
}

Inbox BatchRunner::Impl::Wait() {
  absl::Duration timeout = busy_ ? absl::ZeroDuration() : kIdleInterval;
  // A retry or a job's end may be due earlier.
  const absl::Time now = options_.now();
  if (!postponed_.empty()) timeout = std::min(timeout, postponed_.begin()->first - now);
  for (const ActiveJob* job : queue_.jobs()) {
    if (!job->ending) timeout = std::min(timeout, job->expire_time - now);
  }
  const auto woken = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return inbox_.woken; };
  absl::MutexLock lock(&mutex_);
  mutex_.AwaitWithTimeout(absl::Condition(&woken), std::max(timeout, absl::ZeroDuration()));
  return std::exchange(inbox_, {});
}

bool BatchRunner::Impl::Check(const absl::Status& status) {
  if (status.ok()) return true;
  if (std::exchange(stopped_, true)) return false;
  LogEvent(spdlog::level::err, "batch jobs stand still until the next start: their store fails",
           {{"error", std::string(status.message())}});
  Drain();
  return false;
}

void BatchRunner::Impl::PurgeNowAndThen() {
  const auto stopping = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return stopping_; };
  while (true) {
    {
      absl::MutexLock lock(&mutex_);
      if (mutex_.AwaitWithTimeout(absl::Condition(&stopping), options_.purge_interval)) return;
    }
    const auto purged = store_->Purge(options_.now() - options_.upload_ttl);
    if (purged.ok() && *purged > 0) {
      LogEvent(spdlog::level::info, "batch jobs deleted, their time is over", {{"jobs", *purged}});
    }
  }
}

// ---- jobs --------------------------------------------------------------------------------------

void BatchRunner::Impl::LoadJobs() {
  const auto jobs = store_->ActiveJobs();
  if (!Check(jobs.status())) return;
  for (const JobRecord& record : *jobs) queue_.Update(record);
}

void BatchRunner::Impl::UpdateJob(JobId id) {
  const auto record = store_->GetJob(id);
  if (absl::IsNotFound(record.status())) {
    queue_.Remove(id);
  } else if (Check(record.status())) {
    queue_.Update(*record);
  }
  const ActiveJob* job = queue_.Find(id);
  if (job == nullptr || job->ending) Ending(id);
}

void BatchRunner::Impl::Ending(JobId id) {
  for (const CallId place_id : PlacesOf(id)) {
    if (places_.at(place_id).state == Place::State::kRunning) {
      caller_->Cancel(place_id);
    } else {
      Forget(place_id);
    }
  }
}

std::vector<CallId> BatchRunner::Impl::PlacesOf(JobId job) const {
  std::vector<CallId> ids;
  for (const auto& [id, place] : places_) {
    if (place.job == job) ids.push_back(id);
  }
  return ids;
}

void BatchRunner::Impl::ExpireJobs() {
  if (stopped_) return;
  const absl::Time now = options_.now();
  for (const ActiveJob* job : queue_.jobs()) {
    if (!job->ending && job->expire_time <= now) EndJob(job->id, v1::JOB_STATE_EXPIRED, "");
  }
}

void BatchRunner::Impl::EndJob(JobId id, v1::JobState state, const std::string& reason) {
  const auto record = store_->EndJob(id, state, reason);
  if (!absl::IsNotFound(record.status()) && !Check(record.status())) return;
  UpdateJob(id);
}

void BatchRunner::Impl::FinalizeJobs() {
  if (stopped_) return;
  for (const ActiveJob* job : queue_.jobs()) {
    if (!job->ending || job->num_held > 0) continue;
    const JobId id = job->id;
    const auto whole = store_->FinalizeSome(id, kFinalizedAtOnce);
    if (!absl::IsNotFound(whole.status()) && !Check(whole.status())) return;
    busy_ = true;
    if (!whole.ok() || *whole) UpdateJob(id);
  }
}

// ---- items -------------------------------------------------------------------------------------

void BatchRunner::Impl::OnStarted(CallId id) {
  const auto it = places_.find(id);
  if (it == places_.end()) return;  // its job ended meanwhile
  Place& place = it->second;
  absl::StatusOr<LocalRequest> request = RequestOf(place.item);
  if (!request.ok()) {
    Fail(place, ToItemError(request.status()));
    Forget(id);
    return;
  }
  place.state = Place::State::kRunning;
  const ActiveJob* job = queue_.Find(place.job);
  caller_->Start(id, *std::move(request), {.priority = job->priority, .seed = place.item.seed},
                 [this, id](absl::StatusOr<LocalResponse> response) {
                   absl::MutexLock lock(&mutex_);
                   inbox_.woken = true;
                   inbox_.ended.emplace_back(id, std::move(response));
                 });
}

void BatchRunner::Impl::OnEnded(CallId id, absl::StatusOr<LocalResponse> response) {
  Place& place = places_.at(id);
  const ActiveJob* job = queue_.Find(place.job);
  if (response.ok()) {
    Succeed(place, *std::move(response));
  } else if (job != nullptr && !job->ending && !stopped_) {
    switch (JudgeRun(response.status())) {
      case RunEnd::kFailed:
        Fail(place, ToItemError(response.status()));
        break;
      case RunEnd::kBad:
        return OnBadEnd(id, *job, response.status());
      case RunEnd::kPostponed:
        Return(&place);
        if (draining_) break;
        pause_until_ = options_.now() + options_.retry_delay;
        return Postpone(id, options_.retry_delay);
    }
  }
  Forget(id);
}

void BatchRunner::Impl::OnBadEnd(CallId id, const ActiveJob& job, const absl::Status& error) {
  Place& place = places_.at(id);
  ++place.item.attempts;
  LogEvent(spdlog::level::warn, "a batch item met with a bad end",
           {{"job", job.id},
            {"index", place.item.index},
            {"attempts", place.item.attempts},
            {"reason", ErrorReason(error)},
            {"error", std::string(error.message())}});
  if (place.item.attempts >= job.max_attempts) {
    Fail(place, AttemptsExhausted(place.item.attempts, error));
    return Forget(id);
  }
  if (draining_) return Forget(id);
  absl::Duration delay = options_.retry_delay;
  for (int i = 1; i < place.item.attempts && delay < options_.max_retry_delay; ++i) delay *= 2;
  Postpone(id, std::min(delay, options_.max_retry_delay));
}

void BatchRunner::Impl::Succeed(const Place& place, LocalResponse response) {
  ItemEnd end{.job = place.job, .result = {}};
  end.result.set_index(place.item.index);
  end.result.set_state(v1::ITEM_STATE_SUCCEEDED);
  std::visit(
      [&end](const auto& proto) {
        end.prompt_tokens = proto.usage().prompt_tokens();
        end.completion_tokens = proto.usage().completion_tokens();
      },
      response);
  if (auto* chat = std::get_if<v1::ChatResponse>(&response)) {
    *end.result.mutable_chat() = std::move(*chat);
  } else {
    *end.result.mutable_complete() = std::move(std::get<v1::CompleteResponse>(response));
  }
  ends_.push_back(std::move(end));
}

void BatchRunner::Impl::Fail(const Place& place, v1::ItemError error) {
  ActiveJob* job = queue_.Find(place.job);
  if (job != nullptr && job->fail_fast && !job->ending) {
    job->ending = true;
    failed_fast_.emplace_back(
        job->id, absl::StrCat("item ", place.item.index, " failed: ", error.message()));
  }
  ItemEnd end{.job = place.job, .result = {}};
  end.result.set_index(place.item.index);
  end.result.set_state(v1::ITEM_STATE_FAILED);
  *end.result.mutable_error() = std::move(error);
  ends_.push_back(std::move(end));
}

void BatchRunner::Impl::Return(Place* place) {
  place->counted = false;  // Write() takes it from the count, once it is written
  returns_.push_back(place->start());
}

void BatchRunner::Impl::LeaveActive(CallId id, Place* place) {
  if (place->state == Place::State::kWaiting) return;
  place->state = Place::State::kWaiting;
  --num_active_;
  if (alone_ == id) alone_ = 0;
  if (std::exchange(place->counted, false)) CountRunning(place->job, -1);
}

void BatchRunner::Impl::Postpone(CallId id, absl::Duration delay) {
  LeaveActive(id, &places_.at(id));
  postponed_.emplace(options_.now() + delay, id);
}

void BatchRunner::Impl::Forget(CallId id) {
  Place& place = places_.at(id);
  LeaveActive(id, &place);
  bytes_ -= place.bytes();
  if (ActiveJob* job = queue_.Find(place.job)) --job->num_held;
  places_.erase(id);
}

// ---- beginning ---------------------------------------------------------------------------------

void BatchRunner::Impl::Begin() {
  const absl::Time now = options_.now();
  for (; !postponed_.empty() && postponed_.begin()->first <= now;
       postponed_.erase(postponed_.begin())) {
    waiting_.push_back(postponed_.begin()->second);
  }
  if (draining_ || stopped_ || now < pause_until_) return;
  const int64_t capacity = caller_->capacity();
  if (capacity == 0) return;
  BeginWaiting();
  BeginNew(options_.max_running > 0 ? options_.max_running : capacity + (capacity + 7) / 8);
}

// In their turn: who runs alone waits for all that run, and all others for it.
void BatchRunner::Impl::BeginWaiting() {
  while (!waiting_.empty() && alone_ == 0) {
    const CallId id = waiting_.front();
    const auto it = places_.find(id);
    if (it != places_.end() && it->second.alone()) {
      if (num_active_ > 0) return;
      alone_ = id;
    }
    waiting_.pop_front();
    if (it != places_.end()) Start(id);
  }
}

void BatchRunner::Impl::BeginNew(int64_t max_places) {
  while (waiting_.empty() && alone_ == 0 && std::ssize(places_) < max_places &&
         (bytes_ == 0 || bytes_ < options_.max_running_bytes)) {
    auto next = queue_.Take();
    if (!Check(next.status()) || !next->has_value()) return;
    ActiveJob* job = (*next)->job;
    Place place{.job = job->id, .item = std::move((*next)->item)};
    if (place.item.attempts >= job->max_attempts) {
      Fail(place, AttemptsExhausted(place.item.attempts, absl::OkStatus()));
      continue;
    }
    while (place.item.seed == 0) place.item.seed = absl::Uniform<uint64_t>(random_);
    ++job->num_held;
    bytes_ += place.bytes();
    const CallId id = ++last_id_;
    places_.emplace(id, std::move(place));
    waiting_.push_back(id);
    BeginWaiting();
  }
}

void BatchRunner::Impl::Start(CallId id) {
  Place& place = places_.at(id);
  place.state = Place::State::kStarting;
  place.counted = true;
  ++num_active_;
  CountRunning(place.job, 1);
  starts_.push_back(place.start());
  starting_.push_back(id);
}

void BatchRunner::Impl::Drain() {
  draining_ = true;
  std::vector<CallId> ids;
  for (const auto& [id, place] : places_) ids.push_back(id);
  for (const CallId id : ids) {
    Place& place = places_.at(id);
    if (place.state == Place::State::kRunning) {
      caller_->Cancel(id);
      continue;
    }
    if (place.state == Place::State::kStarting) Return(&place);
    Forget(id);
  }
}

// ---- writing -----------------------------------------------------------------------------------

void BatchRunner::Impl::Write() {
  if (!returns_.empty()) {
    std::vector<JobId> jobs;
    for (const ItemStart& start : returns_) jobs.push_back(start.job);
    store_->ReturnItems(std::exchange(returns_, {}),
                        Counted([this, jobs = std::move(jobs)](const absl::Status&) {
                          for (const JobId job : jobs) CountRunning(job, -1);
                        }));
  }
  if (!ends_.empty())
    store_->EndItems(std::exchange(ends_, {}), Counted([](const absl::Status&) {}));
  if (!starts_.empty()) {
    store_->StartItems(
        std::exchange(starts_, {}),
        Counted([this, ids = std::exchange(starting_, {})](const absl::Status& status) {
          if (!status.ok()) return;
          absl::MutexLock lock(&mutex_);
          inbox_.woken = true;
          inbox_.started.insert(inbox_.started.end(), ids.begin(), ids.end());
        }));
  }
  for (const auto& [job, reason] : std::exchange(failed_fast_, {})) {
    if (!stopped_) EndJob(job, v1::JOB_STATE_FAILED, reason);
  }
}

BatchStore::Done BatchRunner::Impl::Counted(BatchStore::Done then) {
  absl::MutexLock lock(&mutex_);
  ++num_writes_;
  return [this, then = std::move(then)](const absl::Status& status) {
    then(status);
    absl::MutexLock lock(&mutex_);
    if (!status.ok()) {
      inbox_.woken = true;
      inbox_.store = status;
    }
    --num_writes_;
  };
}

void BatchRunner::Impl::CountRunning(JobId job, int64_t number) {
  absl::MutexLock lock(&mutex_);
  int64_t& count = num_running_[job];
  count += number;
  if (count == 0) num_running_.erase(job);
}

// ---- BatchRunner -------------------------------------------------------------------------------

BatchRunner::BatchRunner(BatchStore* store, LocalCaller* caller, Options options)
    : impl_(std::make_unique<Impl>(store, caller, std::move(options))) {}
BatchRunner::~BatchRunner() = default;
void BatchRunner::OnChange(const std::vector<JobId>& jobs) { impl_->OnChange(jobs); }
int64_t BatchRunner::num_running(JobId job) const { return impl_->num_running(job); }
int64_t BatchRunner::num_running() const { return impl_->num_running(); }
void BatchRunner::StartDrain() { impl_->StartDrain(); }

}  // namespace latentd
