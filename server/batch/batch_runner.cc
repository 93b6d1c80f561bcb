#include "server/batch/batch_runner.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/batch/batch_runner_impl.h"
#include "server/log.h"

namespace latentd {
namespace {

// How often a caller that takes no calls is looked at.
constexpr absl::Duration kIdleInterval = absl::Milliseconds(200);
// Items that are marked at a time when a job ends.
constexpr int64_t kFinalizedAtOnce = 2000;

}  // namespace

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
