#ifndef LATENTD_SERVER_BATCH_BATCH_STREAMS_H_
#define LATENTD_SERVER_BATCH_BATCH_STREAMS_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "server/batch/batch_call.h"

namespace latentd {

// A call that streams what is to be read of one job, as it becomes more: a worker reads the next
// message when the last one is with the client, so a slow one holds one message, and what changes
// meanwhile is in the next.
class JobStream : public BatchCall,
                  public ChangeListener,
                  public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                  public std::enable_shared_from_this<JobStream> {
 public:
  explicit JobStream(BatchHost* host) : host_(host) {}

  void Begin() { OnJobChanged(); }
  void Abort(const absl::Status& status) override;
  void OnJobChanged() override;

 protected:
  // What comes next: a message, the end (the message goes before it), or neither: wait for a
  // change.
  struct Next {
    std::optional<grpc::ByteBuffer> message;
    bool is_end = false;
  };
  // On a worker thread, one at a time; may block. An error ends the call.
  virtual absl::StatusOr<Next> Read() = 0;

  // Finds the job and hears of its changes from now on.
  absl::StatusOr<JobRecord> Open(const std::string& name);

  BatchHost* const host_;

 private:
  void OnWriteDone(bool ok) override;
  void OnCancel() override { Abort(ClientGone()); }
  void OnDone() override { host_->OnCallDone(this); }

  void Work();
  void Schedule() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void FinishLocked() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  absl::Mutex mutex_;
  bool busy_ ABSL_GUARDED_BY(mutex_) = false;      // Work runs or will, or a write is under way
  bool changed_ ABSL_GUARDED_BY(mutex_) = false;   // since Read was begun
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;  // gRPC has been told the status
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  grpc::ByteBuffer in_flight_ ABSL_GUARDED_BY(mutex_);  // gRPC's while it writes
};

// BatchService.WatchJob.
class WatchCall final : public JobStream {
 public:
  WatchCall(BatchHost* host, grpc::ByteBuffer request)
      : JobStream(host), request_(std::move(request)) {}
  bool ends_at_drain() const override { return true; }

 private:
  absl::StatusOr<Next> Read() override;

  grpc::ByteBuffer request_;
  JobId job_ = 0;  // 0: not opened yet
  int64_t revision_ = 0;
};

// BatchService.StreamResults.
class ResultsCall final : public JobStream {
 public:
  ResultsCall(BatchHost* host, grpc::ByteBuffer request)
      : JobStream(host), bytes_(std::move(request)) {}
  bool ends_at_drain() const override { return follows_; }

 private:
  absl::StatusOr<Next> Read() override;
  absl::Status OpenResults();
  bool IsWanted(v1::ItemState state) const;

  grpc::ByteBuffer bytes_;
  v1::StreamResultsRequest request_;
  std::atomic<bool> follows_ = false;
  JobId job_ = 0;  // 0: not opened yet
  std::string scope_;
  int64_t after_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_STREAMS_H_
