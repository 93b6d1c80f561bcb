#include "server/batch/batch_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "engine/status.h"
#include "latentd/v1/batch.grpc.pb.h"
#include "server/batch/batch_call.h"
#include "server/batch/batch_owner.h"
#include "server/batch/batch_streams.h"
#include "server/batch/batch_upload.h"
#include "server/batch/opaque_token.h"
#include "server/log.h"
#include "server/request_checks.h"
#include "server/status.h"
#include "server/wire.h"
#include "server/worker_pool.h"

namespace latentd {
namespace {

using Raw = v1::BatchService::WithRawCallbackMethod_CreateJob<
    v1::BatchService::WithRawCallbackMethod_GetUpload<
        v1::BatchService::WithRawCallbackMethod_GetJob<
            v1::BatchService::WithRawCallbackMethod_ListJobs<
                v1::BatchService::WithRawCallbackMethod_WatchJob<
                    v1::BatchService::WithRawCallbackMethod_CancelJob<
                        v1::BatchService::WithRawCallbackMethod_DeleteJob<
                            v1::BatchService::WithRawCallbackMethod_StreamResults<
                                v1::BatchService::WithRawCallbackMethod_RetryJob<
                                    v1::BatchService::Service>>>>>>>>>;
using Context = grpc::CallbackServerContext;
using Bytes = grpc::ByteBuffer;

constexpr int32_t kDefaultPage = 100;
constexpr int32_t kMaxPage = 1000;
constexpr size_t kMaxPageBytes = size_t{1} << 20;  // clients take 4 MiB
constexpr absl::Duration kQuotaRetryDelay = absl::Minutes(1);

absl::Status Disabled() {
  return MakeError(absl::StatusCode::kFailedPrecondition, "BATCH_DISABLED",
                   "the server takes no batch jobs: it has no batch_dir");
}

absl::Status TooManyCalls(absl::string_view what, int64_t limit) {
  return MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_REQUESTS",
                   absl::StrCat(limit, " ", what, " are open: no more are taken"),
                   {{"limit", absl::StrCat(limit)}});
}

}  // namespace

absl::Status Draining() {
  return MakeError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down");
}

absl::Status QuotaExceeded(const std::string& what, int64_t value, int64_t limit) {
  return WithRetryDelay(
      MakeError(absl::StatusCode::kResourceExhausted, "QUOTA_EXCEEDED",
                absl::StrCat("the client would have ", value, " ", what, "; at most ", limit),
                {{"what", what}, {"value", absl::StrCat(value)}, {"limit", absl::StrCat(limit)}}),
      kQuotaRetryDelay);
}

absl::Status ClientGone() {
  return MakeError(absl::StatusCode::kCancelled, "CANCELLED",
                   "the client has gone, or its deadline has passed");
}

class BatchService::Impl final : public Raw, public BatchHost {
 public:
  Impl(const BatchServiceOptions& options, BatchStore* store, ChangeHub* hub)
      : options_(options),
        store_(store),
        hub_(hub),
        workers_(options.num_workers, std::numeric_limits<size_t>::max()) {}

  void SetServing(std::shared_ptr<const ServedModel> model) {
    absl::MutexLock lock(&mutex_);
    model_ = std::move(model);
  }
  void SetNumRunning(std::function<int64_t(JobId)> num_running) {
    absl::MutexLock lock(&mutex_);
    num_running_ = std::move(num_running);
  }
  void StartDrain();
  void AbortAll(const absl::Status& status, bool only_long = false);

  // BatchHost
  BatchStore& store() override { return *store_; }
  ChangeHub& hub() override { return *hub_; }
  const BatchLimits& limits() const override { return options_.limits; }
  bool draining() const override { return draining_; }
  absl::StatusOr<std::shared_ptr<const ServedModel>> Serving() override;
  v1::Job Present(JobRecord record) override;
  void Run(std::function<void()> task) override { LATENTD_CHECK(workers_.TryRun(std::move(task))); }
  void OnCallDone(BatchCall* call) override;
  void TakeOver(const std::string& owner, const std::string& request_id,
                const std::shared_ptr<UploadCall>& call) override;
  absl::StatusOr<BatchStore::Upload> OpenUpload(
      const std::string& owner, const v1::CreateJobRequest::Header& header) override;

  // v1::BatchService
  grpc::ServerReadReactor<Bytes>* CreateJob(Context* context, Bytes* response) override;
  grpc::ServerWriteReactor<Bytes>* WatchJob(Context*, const Bytes* request) override {
    return Stream(std::make_shared<WatchCall>(this, *request));
  }
  grpc::ServerWriteReactor<Bytes>* StreamResults(Context*, const Bytes* request) override {
    return Stream(std::make_shared<ResultsCall>(this, *request));
  }
  grpc::ServerUnaryReactor* GetUpload(Context* context, const Bytes* request,
                                      Bytes* response) override {
    return Answer(context, request, response, &Impl::DoGetUpload);
  }
  grpc::ServerUnaryReactor* GetJob(Context* context, const Bytes* request,
                                   Bytes* response) override {
    return Answer(context, request, response, &Impl::DoGetJob);
  }
  grpc::ServerUnaryReactor* ListJobs(Context* context, const Bytes* request,
                                     Bytes* response) override {
    return Answer(context, request, response, &Impl::DoListJobs);
  }
  grpc::ServerUnaryReactor* CancelJob(Context* context, const Bytes* request,
                                      Bytes* response) override {
    return Answer(context, request, response, &Impl::DoCancelJob);
  }
  grpc::ServerUnaryReactor* DeleteJob(Context* context, const Bytes* request,
                                      Bytes* response) override {
    return Answer(context, request, response, &Impl::DoDeleteJob);
  }
  grpc::ServerUnaryReactor* RetryJob(Context* context, const Bytes* request,
                                     Bytes* response) override {
    return Answer(context, request, response, &Impl::DoRetryJob);
  }

 private:
  // ---- the methods, on a worker thread ----
  absl::Status DoGetUpload(const std::string& owner, const v1::GetUploadRequest& request,
                           v1::GetUploadResponse* response);
  absl::Status DoGetJob(const std::string& owner, const v1::GetJobRequest& request,
                        v1::GetJobResponse* response);
  absl::Status DoListJobs(const std::string& owner, const v1::ListJobsRequest& request,
                          v1::ListJobsResponse* response);
  absl::Status DoCancelJob(const std::string& owner, const v1::CancelJobRequest& request,
                           v1::CancelJobResponse* response);
  absl::Status DoDeleteJob(const std::string& owner, const v1::DeleteJobRequest& request,
                           v1::DeleteJobResponse* response);
  absl::Status DoRetryJob(const std::string& owner, const v1::RetryJobRequest& request,
                          v1::RetryJobResponse* response);
  absl::StatusOr<JobRecord> Find(const std::string& name) const;
  absl::Status CheckQuota(const std::string& owner, int64_t new_items) const;

  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Answer(Context* context, const Bytes* request, Bytes* response,
                                   absl::Status (Impl::*method)(const std::string& owner,
                                                                const Request&, Response*));

  // Takes a streaming call in; OK: it may begin.
  absl::Status Take(const std::shared_ptr<BatchCall>& call);
  template <typename Call>
  grpc::ServerWriteReactor<Bytes>* Stream(std::shared_ptr<Call> call) {
    absl::Status status = Take(call);
    if (status.ok() && draining_ && call->ends_at_drain()) status = Draining();
    status.ok() ? call->Begin() : call->Abort(status);
    return call.get();  // held by calls_ until gRPC is done with it
  }

  const BatchServiceOptions options_;
  BatchStore* const store_;  // null: no batch jobs
  ChangeHub* const hub_;
  std::atomic<bool> draining_ = false;
  std::atomic<int32_t> num_unary_ = 0;

  // Held from the look at an owner's quota to what adds to it. It blocks.
  absl::Mutex quota_mutex_;

  mutable absl::Mutex mutex_;
  std::shared_ptr<const ServedModel> model_ ABSL_GUARDED_BY(mutex_);  // null while loading
  std::function<int64_t(JobId)> num_running_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<BatchCall*, std::shared_ptr<BatchCall>> calls_ ABSL_GUARDED_BY(mutex_);
  int32_t num_uploads_ ABSL_GUARDED_BY(mutex_) = 0;
  // Who uploads under an owner's key.
  std::map<std::pair<std::string, std::string>, std::weak_ptr<UploadCall>> uploaders_
      ABSL_GUARDED_BY(mutex_);

  WorkerPool workers_;  // last: its threads use all of the above
};

// ---- calls -------------------------------------------------------------------------------------

absl::Status BatchService::Impl::Take(const std::shared_ptr<BatchCall>& call) {
  absl::MutexLock lock(&mutex_);
  calls_.emplace(call.get(), call);
  if (store_ == nullptr) return Disabled();
  if (calls_.size() > static_cast<size_t>(options_.max_calls)) {
    return TooManyCalls("streams", options_.max_calls);
  }
  return absl::OkStatus();
}

void BatchService::Impl::OnCallDone(BatchCall* call) {
  std::shared_ptr<BatchCall> last;  // destroyed without the lock
  absl::MutexLock lock(&mutex_);
  last = std::move(calls_.extract(call).mapped());
  if (dynamic_cast<UploadCall*>(call) == nullptr) return;
  --num_uploads_;
  // Its own entry, and what others have left.
  std::erase_if(uploaders_, [call](const auto& entry) {
    const auto live = entry.second.lock();
    return live == nullptr || live.get() == call;
  });
}

void BatchService::Impl::StartDrain() {
  draining_ = true;
  AbortAll(Draining(), /*only_long=*/true);
}

void BatchService::Impl::AbortAll(const absl::Status& status, bool only_long) {
  std::vector<std::shared_ptr<BatchCall>> calls;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [pointer, call] : calls_) {
      if (!only_long || call->ends_at_drain()) calls.push_back(call);
    }
  }
  for (const auto& call : calls) call->Abort(status);
}

grpc::ServerReadReactor<Bytes>* BatchService::Impl::CreateJob(Context* context, Bytes* response) {
  const absl::StatusOr<std::string> owner = OwnerOf(*context);
  auto call = std::make_shared<UploadCall>(this, owner.value_or(""), response);
  absl::Status status = Take(call);
  {
    absl::MutexLock lock(&mutex_);
    if (++num_uploads_ > options_.max_uploads && status.ok()) {
      status = TooManyCalls("uploads", options_.max_uploads);
    }
  }
  if (status.ok()) status = owner.status();
  if (status.ok()) status = Serving().status();
  status.ok() ? call->Begin() : call->Abort(status);
  return call.get();
}

template <typename Request, typename Response>
grpc::ServerUnaryReactor* BatchService::Impl::Answer(
    Context* context, const Bytes* request, Bytes* response,
    absl::Status (Impl::*method)(const std::string& owner, const Request&, Response*)) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  absl::StatusOr<std::string> owner = OwnerOf(*context);
  absl::Status status = store_ == nullptr ? Disabled() : owner.status();
  if (status.ok() && num_unary_ >= options_.max_calls) {
    status = TooManyCalls("calls", options_.max_calls);
  }
  if (!status.ok()) {
    reactor->Finish(ToGrpcStatus(status));
    return reactor;
  }
  ++num_unary_;
  // gRPC keeps request, response and reactor until Finish.
  Run([this, request, response, reactor, owner = *std::move(owner), method] {
    const absl::Status status = [&]() -> absl::Status {
      ASSIGN_OR_RETURN(const Request proto, Parse<Request>(*request));
      Response result;
      RETURN_IF_ERROR((this->*method)(owner, proto, &result));
      *response = Encode(result);
      return absl::OkStatus();
    }();
    --num_unary_;
    reactor->Finish(ToGrpcStatus(status));
  });
  return reactor;
}

// ---- what streaming calls need -----------------------------------------------------------------

absl::StatusOr<std::shared_ptr<const ServedModel>> BatchService::Impl::Serving() {
  if (draining_) return Draining();
  absl::MutexLock lock(&mutex_);
  if (model_ != nullptr) return model_;
  return WithRetryDelay(
      MakeError(absl::StatusCode::kUnavailable, "LOADING", "the model is being loaded"),
      absl::Seconds(5));
}

v1::Job BatchService::Impl::Present(JobRecord record) {
  v1::JobCounts& counts = *record.job.mutable_counts();
  absl::MutexLock lock(&mutex_);
  if (num_running_ && !HasEnded(record.job)) {
    // The two are read one after the other.
    counts.set_running(std::min<int64_t>(num_running_(record.id), counts.pending()));
    counts.set_pending(counts.pending() - counts.running());
  }
  return std::move(record.job);
}

void BatchService::Impl::TakeOver(const std::string& owner, const std::string& request_id,
                                  const std::shared_ptr<UploadCall>& call) {
  std::shared_ptr<UploadCall> before;
  {
    absl::MutexLock lock(&mutex_);
    std::weak_ptr<UploadCall>& uploader = uploaders_[{owner, request_id}];
    before = uploader.lock();
    uploader = call;
  }
  if (before != nullptr) before->Supersede();
}

absl::StatusOr<BatchStore::Upload> BatchService::Impl::OpenUpload(
    const std::string& owner, const v1::CreateJobRequest::Header& header) {
  absl::MutexLock lock(&quota_mutex_);
  const auto known = store_->GetUpload(owner, header.request_id());
  if (absl::IsNotFound(known.status())) {
    RETURN_IF_ERROR(CheckQuota(owner, /*new_items=*/1));
  } else {
    RETURN_IF_ERROR(known.status());
  }
  return store_->OpenUpload(owner, header.request_id(), header.spec());
}

absl::Status BatchService::Impl::CheckQuota(const std::string& owner, int64_t new_items) const {
  ASSIGN_OR_RETURN(const BatchStore::Usage usage, store_->UsageOf(owner));
  const BatchLimits& limits = options_.limits;
  if (usage.jobs >= limits.max_jobs) {
    return QuotaExceeded("jobs that have not ended", usage.jobs + 1, limits.max_jobs);
  }
  if (usage.items + new_items > limits.max_items) {
    return QuotaExceeded("items that have not ended", usage.items + new_items, limits.max_items);
  }
  return absl::OkStatus();
}

// ---- v1::BatchService --------------------------------------------------------------------------

absl::StatusOr<JobRecord> BatchService::Impl::Find(const std::string& name) const {
  if (name.empty()) return MakeBadRequest({{"name", "is not set"}});
  return store_->GetJob(name);
}

absl::Status BatchService::Impl::DoGetUpload(const std::string& owner,
                                             const v1::GetUploadRequest& request,
                                             v1::GetUploadResponse* response) {
  RETURN_IF_ERROR(CheckKey(request.request_id()));
  ASSIGN_OR_RETURN(BatchStore::Upload upload, store_->GetUpload(owner, request.request_id()));
  response->set_item_count(upload.item_count);
  response->set_sha256(upload.sha256);
  if (upload.record.job.state() != v1::JOB_STATE_VALIDATING) {
    *response->mutable_job() = Present(std::move(upload.record));
  }
  return absl::OkStatus();
}

absl::Status BatchService::Impl::DoGetJob(const std::string&, const v1::GetJobRequest& request,
                                          v1::GetJobResponse* response) {
  ASSIGN_OR_RETURN(JobRecord record, Find(request.name()));
  *response->mutable_job() = Present(std::move(record));
  return absl::OkStatus();
}

absl::Status BatchService::Impl::DoListJobs(const std::string& owner,
                                            const v1::ListJobsRequest& request,
                                            v1::ListJobsResponse* response) {
  RequestErrors errors;
  if (request.page_size() < 0 || request.page_size() > kMaxPage) {
    errors.Invalid("page_size", absl::StrCat("is ", request.page_size(), "; must be in [1, ",
                                             kMaxPage, "], or 0"));
  }
  JobFilter filter = {.owner = owner, .states = {}, .metadata = {}};
  std::string scope = absl::StrCat("jobs of ", owner);
  for (int i = 0; i < request.states_size(); ++i) {
    const v1::JobState state = request.states(i);
    if (state == v1::JOB_STATE_UNSPECIFIED || !v1::JobState_IsValid(state)) {
      errors.Invalid(absl::StrCat("states[", i, "]"),
                     absl::StrCat("is ", static_cast<int>(state), ", which is no state"));
    }
    filter.states.push_back(state);
    absl::StrAppend(&scope, " ", static_cast<int>(state));
  }
  CheckMetadata(request.metadata(), "metadata", &errors);
  filter.metadata.assign(request.metadata().begin(), request.metadata().end());
  std::sort(filter.metadata.begin(), filter.metadata.end());
  for (const auto& [key, value] : filter.metadata) {
    absl::StrAppend(&scope, " ", key.size(), ":", key, "=", value.size(), ":", value);
  }
  JobId before = std::numeric_limits<JobId>::max();
  if (!request.page_token().empty()) {
    const auto position = ReadOpaqueToken(scope, request.page_token());
    if (!position) errors.Invalid("page_token", "is not of this filter");
    before = position.value_or(before);
  }
  RETURN_IF_ERROR(errors.ToStatus());

  const int limit = request.page_size() == 0 ? kDefaultPage : request.page_size();
  ASSIGN_OR_RETURN(std::vector<JobRecord> records, store_->ListJobs(filter, before, limit + 1));
  size_t bytes = 0;
  for (JobRecord& record : records) {
    bytes += record.job.ByteSizeLong();
    const bool is_full = response->jobs_size() == limit || bytes > kMaxPageBytes;
    if (is_full && response->jobs_size() > 0) {
      response->set_next_page_token(OpaqueToken(scope, before));
      break;
    }
    before = record.id;
    *response->add_jobs() = Present(std::move(record));
  }
  return absl::OkStatus();
}

absl::Status BatchService::Impl::DoCancelJob(const std::string& owner,
                                             const v1::CancelJobRequest& request,
                                             v1::CancelJobResponse* response) {
  ASSIGN_OR_RETURN(JobRecord record, Find(request.name()));
  if (!HasEnded(record.job)) {
    ASSIGN_OR_RETURN(record, store_->EndJob(record.id, v1::JOB_STATE_CANCELLED, /*reason=*/""));
    LogEvent(spdlog::level::info, "batch job cancelled",
             {{"job", record.job.name()}, {"by", owner}});
  }
  *response->mutable_job() = Present(std::move(record));
  return absl::OkStatus();
}

absl::Status BatchService::Impl::DoDeleteJob(const std::string& owner,
                                             const v1::DeleteJobRequest& request,
                                             v1::DeleteJobResponse*) {
  ASSIGN_OR_RETURN(const JobRecord record, Find(request.name()));
  RETURN_IF_ERROR(store_->DeleteJob(record.id, request.etag()));
  LogEvent(spdlog::level::info, "batch job deleted", {{"job", record.job.name()}, {"by", owner}});
  return absl::OkStatus();
}

absl::Status BatchService::Impl::DoRetryJob(const std::string& owner,
                                            const v1::RetryJobRequest& request,
                                            v1::RetryJobResponse* response) {
  RETURN_IF_ERROR(CheckKey(request.request_id()));
  if (draining_) return Draining();
  ASSIGN_OR_RETURN(const JobRecord record, Find(request.name()));
  // Without quota_mutex_: copying a large job takes long. Retries at the same time may exceed it.
  const auto known = store_->GetUpload(owner, request.request_id());
  if (absl::IsNotFound(known.status())) {
    const v1::JobCounts& counts = record.job.counts();
    RETURN_IF_ERROR(CheckQuota(owner, counts.total() - counts.succeeded()));
  }
  ASSIGN_OR_RETURN(BatchStore::Upload retry,
                   store_->RetryJob(record.id, owner, request.request_id()));
  if (retry.is_new) {
    LogEvent(spdlog::level::info, "batch job created",
             {{"job", retry.record.job.name()},
              {"owner", owner},
              {"items", retry.item_count},
              {"retry_of", record.job.name()}});
  }
  response->set_already_existed(!retry.is_new);
  *response->mutable_job() = Present(std::move(retry.record));
  return absl::OkStatus();
}

// ---- BatchService ------------------------------------------------------------------------------

BatchService::BatchService(const BatchServiceOptions& options, BatchStore* store, ChangeHub* hub)
    : impl_(std::make_unique<Impl>(options, store, hub)) {}
BatchService::~BatchService() = default;
grpc::Service* BatchService::grpc_service() { return impl_.get(); }
void BatchService::SetServing(std::shared_ptr<const ServedModel> model) {
  impl_->SetServing(std::move(model));
}
void BatchService::SetNumRunning(std::function<int64_t(JobId)> num_running) {
  impl_->SetNumRunning(std::move(num_running));
}
void BatchService::StartDrain() { impl_->StartDrain(); }
void BatchService::AbortAll(const absl::Status& status) { impl_->AbortAll(status); }

}  // namespace latentd
