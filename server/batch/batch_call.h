#ifndef LATENTD_SERVER_BATCH_BATCH_CALL_H_
#define LATENTD_SERVER_BATCH_BATCH_CALL_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "latentd/v1/batch.pb.h"
#include "server/batch/batch_checks.h"
#include "server/batch/batch_store.h"
#include "server/batch/change_hub.h"
#include "server/served_model.h"

namespace latentd {

// A streaming call of BatchService, which the service holds until gRPC is done with it.
class BatchCall {
 public:
  virtual ~BatchCall() = default;

  // Ends the call with `status`; no-op when it has ended. At once, but for one write that its
  // client does not read. Any thread; does not block.
  virtual void Abort(const absl::Status& status) = 0;
  // Whether it is of those that would go on for long.
  virtual bool ends_at_drain() const = 0;
};

class UploadCall;

// What a streaming call needs of the service. Thread-safe; outlives gRPC's part of the call
// (OnDone), and no call uses it later.
class BatchHost {
 public:
  virtual ~BatchHost() = default;

  virtual BatchStore& store() = 0;
  virtual ChangeHub& hub() = 0;
  virtual const BatchLimits& limits() const = 0;
  // The model, unless it is not loaded yet or the server drains.
  virtual absl::StatusOr<std::shared_ptr<const ServedModel>> Serving() = 0;
  virtual bool draining() const = 0;
  // A job as clients see it: what runs is counted as such.
  virtual v1::Job Present(JobRecord record) = 0;

  // Has a worker do it. A call has one such task at a time.
  virtual void Run(std::function<void()> task) = 0;
  // gRPC has let go of the call.
  virtual void OnCallDone(BatchCall* call) = 0;

  // From now on `call` is the one that uploads under this key of this owner's. The one that did
  // until now is superseded.
  virtual void TakeOver(const std::string& owner, const std::string& request_id,
                        const std::shared_ptr<UploadCall>& call) = 0;
  // BatchStore::OpenUpload, unless the owner has too many jobs. Blocks.
  virtual absl::StatusOr<BatchStore::Upload> OpenUpload(
      const std::string& owner, const v1::CreateJobRequest::Header& header) = 0;
};

// UNAVAILABLE, reason DRAINING.
absl::Status Draining();
// RESOURCE_EXHAUSTED, reason QUOTA_EXCEEDED: an owner's `what` ("items that have not ended").
absl::Status QuotaExceeded(const std::string& what, int64_t value, int64_t limit);
// How gRPC's word that a call is over is told.
absl::Status ClientGone();
// QUEUED to CANCELLING is under way, what comes after has ended.
inline bool HasEnded(const v1::Job& job) { return job.state() >= v1::JOB_STATE_COMPLETED; }

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_CALL_H_
