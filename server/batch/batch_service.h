#ifndef LATENTD_SERVER_BATCH_BATCH_SERVICE_H_
#define LATENTD_SERVER_BATCH_BATCH_SERVICE_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/status/status.h"
#include "server/batch/batch_checks.h"
#include "server/batch/batch_store.h"
#include "server/batch/change_hub.h"
#include "server/served_model.h"

namespace grpc {
class Service;
}  // namespace grpc

namespace latentd {

struct BatchServiceOptions {
  BatchLimits limits;
  // Threads that check items and wait for the store, so that gRPC's own never do. >= 1.
  int32_t num_workers = 4;
  // Calls that are open at once, and uploads among them; one more is refused with
  // RESOURCE_EXHAUSTED. An upload may hold a frame and 4 MiB that wait for the disk.
  int32_t max_calls = 1024;
  int32_t max_uploads = 64;
};

// latentd.v1.BatchService: what clients see of the store. It runs nothing itself.
//
// Every method may be called from any thread and none blocks, the destructor aside.
class BatchService {
 public:
  // Both must outlive the service; `hub` must be told of the store's changes. Without a store every
  // call is FAILED_PRECONDITION, reason BATCH_DISABLED.
  BatchService(const BatchServiceOptions& options, BatchStore* store, ChangeHub* hub);
  // REQUIRES: the gRPC server is shut down: no call is open.
  ~BatchService();

  grpc::Service* grpc_service();

  // From now on jobs are taken: before, CreateJob is UNAVAILABLE, reason LOADING. Call once.
  void SetServing(std::shared_ptr<const ServedModel> model);
  // How many items of a job run now; must not block, and stay valid for the service's life.
  void SetNumRunning(std::function<int64_t(JobId)> num_running);

  // From now on no job is taken; uploads, watches and results that are followed end with
  // UNAVAILABLE, reason DRAINING. What was stored of an upload stays.
  void StartDrain();
  // Ends every stream that is open.
  void AbortAll(const absl::Status& status);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_SERVICE_H_
