#include "server/batch/batch_streams.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/batch/opaque_token.h"
#include "server/status.h"
#include "server/wire.h"

namespace latentd {
namespace {

constexpr int kResultsPerMessage = 1024;
constexpr int64_t kBytesPerMessage = int64_t{256} << 10;

}  // namespace

// ---- JobStream ---------------------------------------------------------------------------------

void JobStream::Abort(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (end_) return;
  end_ = status;
  if (!busy_) FinishLocked();
}

// The store's thread too: the call may be over, and the service gone.
void JobStream::OnJobChanged() {
  absl::MutexLock lock(&mutex_);
  if (finished_) return;
  changed_ = true;
  if (!busy_) Schedule();
}

void JobStream::Schedule() {
  busy_ = true;
  host_->Run([self = shared_from_this()] { self->Work(); });
}

void JobStream::FinishLocked() {
  finished_ = true;
  Finish(ToGrpcStatus(*end_));
}

void JobStream::Work() {
  {
    absl::MutexLock lock(&mutex_);
    if (end_) return FinishLocked();
    changed_ = false;
  }
  absl::StatusOr<Next> next = Read();
  absl::MutexLock lock(&mutex_);
  if (!end_ && !next.ok()) end_ = next.status();
  if (end_) return FinishLocked();
  if (next->message.has_value()) {
    in_flight_ = *std::move(next->message);
    if (next->is_end) {
      end_ = absl::OkStatus();
      finished_ = true;
      StartWriteAndFinish(&in_flight_, grpc::WriteOptions(), grpc::Status::OK);
    } else {
      StartWrite(&in_flight_);
    }
  } else if (next->is_end) {
    end_ = absl::OkStatus();
    FinishLocked();
  } else if (changed_) {
    Schedule();
  } else {
    busy_ = false;
  }
}

void JobStream::OnWriteDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  if (finished_) return;
  if (!ok && !end_) end_ = ClientGone();
  if (end_) return FinishLocked();
  Schedule();
}

absl::StatusOr<JobRecord> JobStream::Open(const std::string& name) {
  if (name.empty()) return MakeBadRequest({{"name", "is not set"}});
  ASSIGN_OR_RETURN(const JobRecord found, host_->store().GetJob(name));
  host_->hub().Subscribe(found.id, weak_from_this());
  return host_->store().GetJob(found.id);  // as it is since then
}

// ---- WatchCall ---------------------------------------------------------------------------------

absl::StatusOr<JobStream::Next> WatchCall::Read() {
  JobRecord record;
  if (job_ == 0) {
    ASSIGN_OR_RETURN(const auto request, Parse<v1::WatchJobRequest>(request_));
    request_.Clear();
    ASSIGN_OR_RETURN(record, Open(request.name()));
    job_ = record.id;
    revision_ = request.from_revision();
  } else {
    ASSIGN_OR_RETURN(record, host_->store().GetJob(job_));
  }
  Next next;
  next.is_end = HasEnded(record.job);
  if (record.job.revision() > revision_) {
    revision_ = record.job.revision();
    v1::WatchJobResponse response;
    *response.mutable_job() = host_->Present(std::move(record));
    next.message = Encode(response);
  }
  return next;
}

// ---- ResultsCall -------------------------------------------------------------------------------

absl::Status ResultsCall::OpenResults() {
  ASSIGN_OR_RETURN(request_, Parse<v1::StreamResultsRequest>(bytes_));
  bytes_.Clear();
  for (int i = 0; i < request_.states_size(); ++i) {
    if (request_.states(i) < v1::ITEM_STATE_SUCCEEDED ||
        request_.states(i) > v1::ITEM_STATE_EXPIRED) {
      return MakeBadRequest({{absl::StrCat("states[", i, "]"),
                              absl::StrCat("is ", static_cast<int>(request_.states(i)),
                                           "; must be succeeded, failed, cancelled or expired")}});
    }
  }
  ASSIGN_OR_RETURN(const JobRecord record, Open(request_.name()));
  scope_ = absl::StrCat("results of ", record.job.name());
  if (!request_.cursor().empty()) {
    const auto position = ReadOpaqueToken(scope_, request_.cursor());
    if (!position) return MakeBadRequest({{"cursor", "is not of this job"}});
    after_ = *position;
  }
  job_ = record.id;
  follows_ = request_.follow();
  return follows_ && host_->draining() ? Draining() : absl::OkStatus();  // StartDrain has passed
}

bool ResultsCall::IsWanted(v1::ItemState state) const {
  const auto& states = request_.states();
  return states.empty() || std::find(states.begin(), states.end(), state) != states.end();
}

absl::StatusOr<JobStream::Next> ResultsCall::Read() {
  if (job_ == 0) RETURN_IF_ERROR(OpenResults());
  // Before the results: those of a job that has ended are all there.
  ASSIGN_OR_RETURN(const JobRecord record, host_->store().GetJob(job_));
  v1::StreamResultsResponse response;
  Next next;
  while (response.results().empty()) {
    ASSIGN_OR_RETURN(
        std::vector<BatchStore::Result> results,
        host_->store().ReadResults(job_, after_, kResultsPerMessage, kBytesPerMessage));
    if (results.empty()) {
      next.is_end = !request_.follow() || HasEnded(record.job);
      return next;
    }
    after_ = results.back().sequence;
    for (BatchStore::Result& result : results) {
      if (IsWanted(result.result.state())) *response.add_results() = std::move(result.result);
    }
  }
  response.set_cursor(OpaqueToken(scope_, after_));
  next.message = Encode(response);
  return next;
}

}  // namespace latentd
