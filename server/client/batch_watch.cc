#include "server/client/batch_watch.h"

#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/client/batch_progress.h"

namespace latentd {
namespace {

// One stream of changes, from `job`'s revision on.
grpc::Status StreamChanges(BatchClient& client,
                           const std::function<void(const v1::Job&)>& on_change, v1::Job* job) {
  grpc::ClientContext context;
  client.Prepare(&context);
  const OnInterrupt cancel(client.interrupts(), [&context] { context.TryCancel(); });
  v1::WatchJobRequest request;
  request.set_name(job->name());
  request.set_from_revision(job->revision());
  const auto reader = client.stub().WatchJob(&context, request);
  const absl::Time start = absl::Now();
  v1::WatchJobResponse response;
  while (reader->Read(&response)) {
    client.Progressed();
    *job = std::move(*response.mutable_job());
    on_change(*job);
  }
  client.StreamEnded(start);
  return reader->Finish();
}

void ShowJob(const v1::Job& job, ProgressBar* bar) {
  const v1::JobCounts& counts = job.counts();
  std::string suffix;
  if (counts.failed() > 0) absl::StrAppend(&suffix, ", ", counts.failed(), " failed");
  bar->Show(StateName(job.state()), NumEnded(counts), counts.total(), suffix, absl::Now());
}

// "jobs/...: completed: 1990 of 2000 items succeeded, 10 failed".
std::string Summary(const v1::Job& job) {
  const v1::JobCounts& counts = job.counts();
  std::string text = absl::StrCat(job.name(), ": ", StateName(job.state()), ": ",
                                  counts.succeeded(), " of ", counts.total(), " items succeeded");
  if (counts.failed() > 0) absl::StrAppend(&text, ", ", counts.failed(), " failed");
  if (counts.cancelled() > 0) absl::StrAppend(&text, ", ", counts.cancelled(), " cancelled");
  if (counts.expired() > 0) absl::StrAppend(&text, ", ", counts.expired(), " expired");
  if (!job.state_reason().empty()) absl::StrAppend(&text, " (", job.state_reason(), ")");
  return text;
}

}  // namespace

int ExitCodeOf(const v1::Job& job) {
  switch (job.state()) {
    case v1::JOB_STATE_COMPLETED:
      return job.counts().failed() > 0 ? kExitItemsFailed : kExitOk;
    case v1::JOB_STATE_EXPIRED:
      return kExitJobExpired;
    case v1::JOB_STATE_CANCELLED:
      return kExitJobCancelled;
    default:
      return kExitJobFailed;
  }
}

grpc::Status FollowJob(BatchClient& client, const std::string& name,
                       const std::function<void(const v1::Job&)>& on_change, v1::Job* job) {
  while (true) {
    // The job as it is, rather than from the revision before: a server that has begun anew may
    // count what is not on its disk from an earlier one on.
    v1::GetJobRequest request;
    request.set_name(name);
    v1::GetJobResponse response;
    grpc::Status status = client.Call(&v1::BatchService::Stub::GetJob, request, &response);
    if (!status.ok()) return status;
    const bool is_new = job->revision() != response.job().revision();
    *job = std::move(*response.mutable_job());
    if (is_new) on_change(*job);
    if (HasEnded(job->state())) return grpc::Status::OK;
    status = StreamChanges(client, on_change, job);
    if (HasEnded(job->state())) return grpc::Status::OK;
    if (status.ok()) {
      status = {grpc::StatusCode::UNAVAILABLE, "the stream of changes ended before the job"};
    }
    if (!client.TryAgain(status)) return status;
  }
}

int WatchJob(BatchClient& client, const std::string& name, bool json,
             const BatchTerminal& terminal) {
  ProgressBar bar(terminal.err_is_terminal, terminal.err);
  client.set_on_retry([&bar] { bar.End(); });
  v1::Job job;
  const auto on_change = [&](const v1::Job& now) {
    if (json) {
      terminal.out << JsonLine(now) << std::endl;
    } else {
      ShowJob(now, &bar);
    }
  };
  const grpc::Status status = FollowJob(client, name, on_change, &job);
  bar.End();
  client.set_on_retry([] {});
  if (client.interrupts().pending()) {
    terminal.err << name << " goes on; `latentd batch watch " << name << "` follows it"
                 << std::endl;
    return kExitInterrupted;
  }
  if (!status.ok()) {
    terminal.err << "error: " << DescribeError(status) << std::endl;
    return kExitFailed;
  }
  terminal.err << Summary(job) << std::endl;
  return ExitCodeOf(job);
}

}  // namespace latentd
