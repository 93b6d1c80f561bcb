#include "server/batch/batch_upload.h"

#include <algorithm>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/log.h"
#include "server/status.h"
#include "server/wire.h"

namespace latentd {
namespace {

constexpr int64_t kMaxUnwritten = int64_t{4} << 20;  // bytes of one upload with the store
constexpr int64_t kAppendBytes = int64_t{256} << 10;
constexpr size_t kAppendItems = 1024;
constexpr size_t kMaxViolations = 100;

absl::Status BadFrame(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, "BAD_FRAME", message);
}

// The key is that of something else.
absl::Status OtherUpload(absl::string_view message) {
  return MakeError(absl::StatusCode::kAlreadyExists, "REQUEST_ID_USED", message);
}

std::string_view View(const grpc::Slice& slice) {
  return {reinterpret_cast<const char*>(slice.begin()), slice.size()};
}

}  // namespace

// ---- the call ----------------------------------------------------------------------------------

void UploadCall::Begin() {
  absl::MutexLock lock(&mutex_);
  if (!finished_) StartRead(&buffer_);
}

void UploadCall::Abort(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (end_) return;
  end_ = status;
  if (!working_) FinishLocked();
}

void UploadCall::Supersede() {
  Abort(MakeError(absl::StatusCode::kAborted, "UPLOAD_SUPERSEDED",
                  "another call uploads the same job"));
  absl::MutexLock lock(&append_mutex_);
  superseded_ = true;
}

void UploadCall::FinishLocked() {
  waiting_ = false;
  finished_ = true;
  Finish(ToGrpcStatus(*end_));
}

void UploadCall::OnReadDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  if (finished_) return;
  phase_ = ok ? Phase::kFrame : Phase::kNoMore;
  working_ = true;
  host_->Run([self = shared_from_this()] { self->Work(); });
}

void UploadCall::Work() {
  while (GoOn()) {
    const absl::Status status = Step();
    if (status.ok()) continue;
    absl::MutexLock lock(&mutex_);
    if (!end_) end_ = status;
  }
}

bool UploadCall::GoOn() {
  absl::MutexLock lock(&mutex_);
  if (end_) {
    working_ = false;
    FinishLocked();
    return false;
  }
  const bool is_last = phase_ == Phase::kCommit || phase_ == Phase::kNoMore;
  if (unwritten_ > (is_last ? 0 : kMaxUnwritten)) {
    waiting_ = true;
    working_ = false;
    return false;
  }
  if (phase_ != Phase::kRead) return true;
  working_ = false;
  StartRead(&buffer_);
  return false;
}

// The store's thread. The call may be over, and the service gone.
void UploadCall::OnWritten(const absl::Status& status, int64_t bytes) {
  absl::MutexLock lock(&mutex_);
  unwritten_ -= bytes;
  if (finished_) return;
  if (!status.ok() && !end_) {
    end_ = absl::IsFailedPrecondition(status)
               ? MakeError(absl::StatusCode::kAborted, "UPLOAD_SUPERSEDED", status.message())
               : status;
  }
  if (working_) return;  // looks at end_ itself
  if (end_) {
    FinishLocked();
    return;
  }
  const bool is_last = phase_ == Phase::kCommit || phase_ == Phase::kNoMore;
  if (!waiting_ || unwritten_ > (is_last ? 0 : kMaxUnwritten / 2)) return;
  waiting_ = false;
  working_ = true;
  host_->Run([self = shared_from_this()] { self->Work(); });
}

// ---- its frames --------------------------------------------------------------------------------

absl::Status UploadCall::Step() {
  Phase phase;
  {
    absl::MutexLock lock(&mutex_);
    phase = phase_;
  }
  absl::Status status;
  Phase next = Phase::kRead;
  if (phase == Phase::kFrame) {
    RETURN_IF_ERROR(TakeFrame());
    if (frame_->kind() == UploadFrame::Kind::kItems) next = Phase::kItems;
    if (frame_->kind() == UploadFrame::Kind::kCommit) next = Phase::kCommit;
  } else if (phase == Phase::kItems) {
    RETURN_IF_ERROR(TakeItems());
    if (frame_.has_value()) next = Phase::kItems;
  } else if (phase == Phase::kCommit) {
    return TakeCommit();
  } else {
    return MakeError(absl::StatusCode::kInvalidArgument, "NO_COMMIT",
                     absl::StrCat("the stream ended without a commit; the upload has ", next_,
                                  " items and can go on"),
                     {{"items", absl::StrCat(next_)}});
  }
  absl::MutexLock lock(&mutex_);
  phase_ = next;
  return absl::OkStatus();
}

absl::Status UploadCall::TakeFrame() {
  if (!buffer_.DumpToSingleSlice(&bytes_).ok()) return BadFrame("the message cannot be read");
  buffer_.Clear();
  ASSIGN_OR_RETURN(frame_, UploadFrame::Cut(View(bytes_)));
  if (frame_->kind() == UploadFrame::Kind::kHeader) return TakeHeader(frame_->header());
  if (!job_.has_value()) return BadFrame("the first message must be a header");
  return absl::OkStatus();
}

absl::Status UploadCall::TakeHeader(v1::CreateJobRequest::Header header) {
  if (job_.has_value()) return BadFrame("a second header");
  ASSIGN_OR_RETURN(model_, host_->Serving());
  ASSIGN_OR_RETURN(header, CheckHeader(std::move(header), *model_, host_->limits()));
  host_->TakeOver(owner_, header.request_id(), shared_from_this());
  ASSIGN_OR_RETURN(BatchStore::Upload upload, host_->OpenUpload(owner_, header));
  stored_ = upload.item_count;
  next_ = header.first_item();
  if (next_ > stored_) {
    if (upload.is_new) RETURN_IF_ERROR(host_->store().AbandonUpload(upload.record.id));
    return MakeBadRequest(
        {{"header.first_item", absl::StrCat("is ", next_, "; ", stored_, " items are stored")}});
  }
  stored_chain_ = upload.sha256;
  std::string chain;
  if (next_ == stored_) {
    chain = stored_chain_;
  } else if (next_ > 0) {
    ASSIGN_OR_RETURN(chain, host_->store().ChainOf(upload.record.id, next_));
  }
  chain_.emplace(chain);
  ASSIGN_OR_RETURN(const BatchStore::Usage usage, host_->store().UsageOf(owner_));
  others_items_ = usage.items - (HasEnded(upload.record.job) ? 0 : stored_);
  job_ = std::move(upload.record);
  return absl::OkStatus();
}

// Some of the frame's items; when they were the last, there is no frame any more.
absl::Status UploadCall::TakeItems() {
  std::vector<NewItem> items;
  int64_t first = 0;
  int64_t bytes = 0;
  bool is_last = false;
  for (size_t i = 0; i < kAppendItems && bytes < kAppendBytes; ++i) {
    const std::optional<std::string_view> item = frame_->NextItem();
    is_last = !item.has_value();
    if (is_last) break;
    const size_t before = items.size();
    RETURN_IF_ERROR(TakeItem(*item, &items));
    if (items.size() == before) continue;
    if (before == 0) first = next_ - 1;
    bytes += static_cast<int64_t>(item->size() + sizeof(NewItem));
  }
  if (is_last) {
    frame_.reset();
    bytes_ = grpc::Slice();
  }
  return items.empty() ? absl::OkStatus() : Append(first, std::move(items), bytes);
}

absl::Status UploadCall::TakeItem(std::string_view bytes, std::vector<NewItem>* items) {
  const bool is_committed = job_->job.state() != v1::JOB_STATE_VALIDATING;
  if (next_ >= stored_ && is_committed) {
    return OtherUpload(
        absl::StrCat("the job of this request_id has ", stored_, " items, not more"));
  }
  const int64_t max_items = host_->limits().max_job_items;
  if (next_ >= max_items) {
    violations_.push_back({"items", absl::StrCat("are more than ", max_items, ", the limit")});
    return Reject();
  }
  chain_->Add(bytes);
  const int64_t index = next_++;
  if (index < stored_) {
    if (next_ == stored_ && chain_->value() != stored_chain_) {
      return OtherUpload("the upload of this request_id has other items");
    }
    return absl::OkStatus();
  }
  std::string custom_id = CheckItem(bytes, index, *model_, host_->limits(), &violations_);
  if (violations_.size() >= kMaxViolations) return Reject();
  if (!violations_.empty()) return absl::OkStatus();
  if (others_items_ + next_ > host_->limits().max_items) {
    return QuotaExceeded("items that have not ended", others_items_ + next_,
                         host_->limits().max_items);
  }
  items->push_back({.custom_id = std::move(custom_id), .request = std::string(bytes)});
  return absl::OkStatus();
}

absl::Status UploadCall::Append(int64_t first, std::vector<NewItem> items, int64_t bytes) {
  {
    absl::MutexLock lock(&mutex_);
    unwritten_ += bytes;
  }
  absl::MutexLock lock(&append_mutex_);
  if (superseded_) return absl::AbortedError("superseded");  // end_ says it already
  host_->store().AppendItems(job_->id, first, std::move(items),
                             [self = shared_from_this(), bytes](const absl::Status& status) {
                               self->OnWritten(status, bytes);
                             });
  return absl::OkStatus();
}

// ---- its end -----------------------------------------------------------------------------------

absl::Status UploadCall::TakeCommit() {
  RETURN_IF_ERROR(CheckCommit());
  if (job_->job.state() != v1::JOB_STATE_VALIDATING) {
    ASSIGN_OR_RETURN(JobRecord record, host_->store().GetJob(job_->id));
    return Respond(std::move(record), /*already_existed=*/true);
  }
  // What was counted when this attempt began may be less than what there is now.
  ASSIGN_OR_RETURN(const BatchStore::Usage usage, host_->store().UsageOf(owner_));
  if (usage.items > host_->limits().max_items) {
    return QuotaExceeded("items that have not ended", usage.items, host_->limits().max_items);
  }
  auto record = host_->store().CommitUpload(job_->id, next_, kMaxViolations);
  if (!record.ok()) {
    if (absl::IsInvalidArgument(record.status())) RETURN_IF_ERROR(Drop());
    return record.status();
  }
  LogEvent(spdlog::level::info, "batch job created",
           {{"job", record->job.name()}, {"owner", owner_}, {"items", next_}});
  return Respond(*std::move(record), /*already_existed=*/false);
}

absl::Status UploadCall::CheckCommit() {
  const v1::CreateJobRequest::Commit& commit = frame_->commit();
  if (commit.item_count() < 1) {
    violations_.push_back(
        {"commit.item_count", absl::StrCat("is ", commit.item_count(), "; must be at least 1")});
  } else if (commit.item_count() != next_) {
    violations_.push_back(
        {"commit.item_count",
         absl::StrCat("is ", commit.item_count(), "; the upload has ", next_, " items")});
  } else if (!commit.sha256().empty() && commit.sha256() != chain_->value()) {
    violations_.push_back(
        {"commit.sha256",
         absl::StrCat("is ", absl::BytesToHexString(commit.sha256()), "; that of the items is ",
                      absl::BytesToHexString(chain_->value()))});
  }
  if (!violations_.empty()) return Reject();
  if (next_ < stored_) {
    return OtherUpload(absl::StrCat("the upload of this request_id has ", stored_, " items"));
  }
  return absl::OkStatus();
}

absl::Status UploadCall::Reject() {
  const size_t room = kMaxViolations - std::min(kMaxViolations, violations_.size());
  if (room > 0 && job_->job.state() == v1::JOB_STATE_VALIDATING) {
    ASSIGN_OR_RETURN(const std::vector<BatchStore::Duplicate> duplicates,
                     host_->store().FindDuplicates(job_->id, static_cast<int>(room)));
    for (const BatchStore::Duplicate& duplicate : duplicates) {
      violations_.push_back({absl::StrCat("items[", duplicate.index, "].custom_id"),
                             absl::StrCat("is '", duplicate.custom_id, "', as that of item ",
                                          duplicate.first_index)});
    }
  }
  RETURN_IF_ERROR(Drop());
  return MakeBadRequest(violations_);
}

absl::Status UploadCall::Drop() {
  absl::MutexLock lock(&append_mutex_);  // who takes over waits, and begins anew
  if (superseded_) return absl::AbortedError("superseded");  // end_ says it already
  return host_->store().AbandonUpload(job_->id);
}

absl::Status UploadCall::Respond(JobRecord record, bool already_existed) {
  v1::CreateJobResponse response;
  *response.mutable_job() = host_->Present(std::move(record));
  response.set_already_existed(already_existed);
  absl::MutexLock lock(&mutex_);
  if (end_) return absl::OkStatus();
  *response_ = Encode(response);
  end_ = absl::OkStatus();
  return absl::OkStatus();
}

}  // namespace latentd
