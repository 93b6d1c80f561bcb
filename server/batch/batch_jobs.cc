#include "server/batch/batch_jobs.h"

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/log.h"

namespace latentd {

absl::StatusOr<std::unique_ptr<BatchJobs>> BatchJobs::Open(Options options) {
  auto jobs = std::unique_ptr<BatchJobs>(new BatchJobs(std::move(options)));
  BatchJobs* const self = jobs.get();
  if (!self->options_.directory.empty()) {
    auto store = BatchStore::Open(
        {.directory = self->options_.directory,
         .on_change = [self](const std::vector<JobId>& changed) { self->OnChange(changed); },
         .on_commit = [self](absl::Duration time) { self->metrics_.OnCommit(time); }});
    if (!store.ok()) {
      return absl::Status(store.status().code(),
                          absl::StrCat("batch_dir ", self->options_.directory.string(), ": ",
                                       std::string(store.status().message())));
    }
    self->store_ = *std::move(store);
    self->watch_ = std::make_unique<BatchMetrics::Watch>(&self->metrics_, self->store_.get());
  }
  self->service_ =
      std::make_unique<BatchService>(self->options_.service, self->store_.get(), &self->hub_);
  self->service_->SetNumRunning([self](JobId job) -> int64_t {
    absl::MutexLock lock(&self->mutex_);
    return self->runner_ == nullptr ? 0 : self->runner_->num_running(job);
  });
  return jobs;
}

BatchJobs::~BatchJobs() { StopRunning(); }

void BatchJobs::OnChange(const std::vector<JobId>& jobs) {
  metrics_.OnChange();
  hub_.Notify(jobs);
  absl::MutexLock lock(&mutex_);
  if (runner_ != nullptr) runner_->OnChange(jobs);
}

void BatchJobs::Serve(std::shared_ptr<const ServedModel> model, LocalCaller* caller) {
  if (store_ == nullptr) return;
  service_->SetServing(std::move(model));
  // Held while the runner is made: it hears of every change after its first look.
  absl::MutexLock lock(&mutex_);
  if (!draining_) runner_ = std::make_unique<BatchRunner>(store_.get(), caller, options_.runner);
}

void BatchJobs::StartDrain() {
  service_->StartDrain();
  absl::MutexLock lock(&mutex_);
  draining_ = true;
  if (runner_ != nullptr) runner_->StartDrain();
}

void BatchJobs::StopRunning() {
  std::unique_ptr<BatchRunner> runner;
  {
    absl::MutexLock lock(&mutex_);
    draining_ = true;
    runner = std::move(runner_);
  }
  runner.reset();  // without the lock, which the store's thread takes
}

void BatchJobs::WriteMetrics(MetricsWriter* out) const {
  if (store_ == nullptr) return;
  int64_t num_running = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (runner_ != nullptr) num_running = runner_->num_running();
  }
  metrics_.Write(num_running, out);
}

}  // namespace latentd
