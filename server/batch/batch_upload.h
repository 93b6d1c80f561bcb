#ifndef LATENTD_SERVER_BATCH_BATCH_UPLOAD_H_
#define LATENTD_SERVER_BATCH_BATCH_UPLOAD_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "grpcpp/support/slice.h"
#include "server/batch/batch_call.h"
#include "server/batch/item_chain.h"
#include "server/batch/upload_frame.h"
#include "server/served_model.h"

namespace latentd {

// BatchService.CreateJob: one attempt at an upload.
//
// The next frame is read when this one is with the store and little of it waits there for its
// commit: a client that sends faster than the disk writes is held back by gRPC's flow control.
//
// What is stored is right: from the first item on that is wrong nothing more is stored, the rest is
// read for more that is wrong, and an attempt that goes on finds that item again.
//
//   gRPC thread     constructs it; a frame has come; the client has gone
//   worker thread   Work, by turns
//   store's thread  items are written
class UploadCall final : public BatchCall,
                         public grpc::ServerReadReactor<grpc::ByteBuffer>,
                         public std::enable_shared_from_this<UploadCall> {
 public:
  // `response` lives until gRPC is done with the call.
  UploadCall(BatchHost* host, std::string owner, grpc::ByteBuffer* response)
      : host_(host), owner_(std::move(owner)), response_(response) {}

  void Begin();
  void Abort(const absl::Status& status) override;
  bool ends_at_drain() const override { return true; }
  // Another call uploads the same job: when this returns, nothing more comes from here.
  void Supersede();

 private:
  // What Work does next.
  enum class Phase {
    kRead,    // wait for a frame
    kFrame,   // one has come
    kItems,   // items of it are left
    kCommit,  // it was a commit
    kNoMore,  // the client sends no more, and there was no commit
  };

  void OnReadDone(bool ok) override;
  void OnCancel() override { Abort(ClientGone()); }
  void OnDone() override { host_->OnCallDone(this); }

  void Work();
  // Whether Work goes on; else what it waits for has been begun.
  bool GoOn();
  void FinishLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void OnWritten(const absl::Status& status, int64_t bytes);

  // ---- the worker's; a status other than OK ends the call ----
  absl::Status Step();
  absl::Status TakeFrame();
  absl::Status TakeHeader(v1::CreateJobRequest::Header header);
  absl::Status TakeItems();
  absl::Status TakeItem(std::string_view bytes, std::vector<NewItem>* items);
  absl::Status TakeCommit();
  absl::Status CheckCommit();
  absl::Status Append(int64_t first, std::vector<NewItem> items, int64_t bytes);
  // Tells all that is wrong, and drops the upload.
  absl::Status Reject();
  // Drops what is stored of it; a job that is committed stays.
  absl::Status Drop();
  absl::Status Respond(JobRecord record, bool already_existed);

  BatchHost* const host_;
  const std::string owner_;
  grpc::ByteBuffer* const response_;

  // The worker's.
  grpc::Slice bytes_;  // of frame_
  std::optional<UploadFrame> frame_;
  std::shared_ptr<const ServedModel> model_;
  std::optional<JobRecord> job_;  // set by the header
  std::optional<ItemChain> chain_;
  std::string stored_chain_;  // of all that were stored when this attempt began
  int64_t stored_ = 0;        // so many
  int64_t next_ = 0;          // index of the next item
  int64_t others_items_ = 0;  // of the owner's, beside this job's
  std::vector<FieldViolation> violations_;

  // Held while items go to the store, to wait for that.
  absl::Mutex append_mutex_;
  bool superseded_ ABSL_GUARDED_BY(append_mutex_) = false;

  absl::Mutex mutex_;
  grpc::ByteBuffer buffer_;  // gRPC's while reading, then the worker's
  Phase phase_ ABSL_GUARDED_BY(mutex_) = Phase::kRead;
  bool working_ ABSL_GUARDED_BY(mutex_) = false;   // Work runs, or will
  bool waiting_ ABSL_GUARDED_BY(mutex_) = false;   // for the store
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // gRPC has been told the status
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  int64_t unwritten_ ABSL_GUARDED_BY(mutex_) = 0;  // bytes that are with the store
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_UPLOAD_H_
