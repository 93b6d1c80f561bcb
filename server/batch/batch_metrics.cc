#include "server/batch/batch_metrics.h"

#include <algorithm>
#include <array>
#include <string>
#include <string_view>
#include <utility>

#include "absl/strings/ascii.h"

namespace latentd {
namespace {

constexpr double kCommitSeconds[] = {.0002, .0005, .001, .002, .005, .01, .02, .05,
                                     .1,    .2,    .5,   1,    2,    5,   10};
// What no change tells, such as a disk that has failed, is seen after so many periods.
constexpr int kPeriodsAtMost = 5;

// JOB_STATE_IN_PROGRESS -> in_progress.
std::string LabelOf(v1::JobState state) {
  const std::string name = v1::JobState_Name(state);
  return absl::AsciiStrToLower(name.substr(std::string_view("JOB_STATE_").size()));
}

}  // namespace

BatchMetrics::BatchMetrics() : commit_(kCommitSeconds) {}

void BatchMetrics::OnChange() {
  absl::MutexLock lock(&mutex_);
  changed_ = true;
}

BatchMetrics::Watch::Watch(BatchMetrics* metrics, const BatchStore* store, absl::Duration period)
    : metrics_(metrics), store_(store), period_(period), thread_([this] { Loop(); }) {}

BatchMetrics::Watch::~Watch() {
  {
    absl::MutexLock lock(&metrics_->mutex_);
    metrics_->stopping_ = true;
  }
  thread_.join();
}

void BatchMetrics::Watch::Loop() {
  const auto due = [this] { return metrics_->stopping_ || metrics_->changed_; };
  while (true) {
    absl::StatusOr<StoreStats> stats = store_->Stats();
    absl::MutexLock lock(&metrics_->mutex_);
    if (stats.ok()) metrics_->stats_ = *std::move(stats);
    metrics_->mutex_.AwaitWithTimeout(absl::Condition(&metrics_->stopping_), period_);
    metrics_->mutex_.AwaitWithTimeout(absl::Condition(&due), (kPeriodsAtMost - 1) * period_);
    if (metrics_->stopping_) return;
    metrics_->changed_ = false;
  }
}

void BatchMetrics::Write(int64_t num_running, MetricsWriter* out, absl::Time now) const {
  absl::MutexLock lock(&mutex_);
  out->Family("latentd_batch_jobs", "Batch jobs that are stored, by state.", "gauge");
  for (int state = v1::JOB_STATE_VALIDATING; state <= v1::JobState_MAX; ++state) {
    int64_t count = 0;
    for (const auto& [of, jobs] : stats_.jobs) {
      if (of == state) count = jobs;
    }
    out->Value(static_cast<double>(count), {{"state", LabelOf(static_cast<v1::JobState>(state))}});
  }
  constexpr std::array<std::string_view, 4> kEnds = {"succeeded", "failed", "cancelled", "expired"};
  out->Family("latentd_batch_items_total", "Items of batch jobs that ended, by state.", "counter");
  for (size_t i = 0; i < kEnds.size(); ++i) {
    out->Value(static_cast<double>(stats_.items_ended[i]), {{"state", std::string(kEnds[i])}});
  }
  out->Gauge("latentd_batch_items_running", "Items that are being computed.",
             static_cast<double>(num_running));
  out->Gauge("latentd_batch_items_pending", "Items of committed jobs that wait.",
             static_cast<double>(std::max<int64_t>(0, stats_.items_pending - num_running)));
  const bool waits = stats_.oldest_pending != absl::InfiniteFuture();
  out->Gauge("latentd_batch_oldest_pending_age_seconds",
             "Since the commit of the oldest job that has items without a result; 0: none has.",
             waits ? std::max(0.0, absl::ToDoubleSeconds(now - stats_.oldest_pending)) : 0);
  out->Family("latentd_batch_deadline_slack_seconds",
              "Until the next job that has not ended expires. No series: there is none.", "gauge");
  if (stats_.earliest_expiry != absl::InfiniteFuture()) {
    out->Value(absl::ToDoubleSeconds(stats_.earliest_expiry - now));
  }
  out->Counter("latentd_batch_recoveries_total",
               "Jobs that the start of the daemon found under way.",
               static_cast<double>(stats_.recoveries));
  out->Distribution("latentd_batch_commit_seconds",
                    "One commit of the store, its wait for the disk included.", commit_);
  out->Gauge("latentd_batch_store_bytes", "Size of the store's files.",
             static_cast<double>(stats_.bytes));
  out->Gauge("latentd_batch_store_failed",
             "1 when a write has failed: no more is taken until the daemon is started again.",
             stats_.failed);
}

}  // namespace latentd
