#ifndef LATENTD_SERVER_BATCH_BATCH_JOBS_H_
#define LATENTD_SERVER_BATCH_BATCH_JOBS_H_

#include <filesystem>
#include <memory>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "server/batch/batch_metrics.h"
#include "server/batch/batch_runner.h"
#include "server/batch/batch_service.h"
#include "server/batch/batch_store.h"
#include "server/batch/change_hub.h"
#include "server/local_caller.h"
#include "server/metrics_writer.h"
#include "server/served_model.h"

namespace latentd {

// Batch jobs as a part of the daemon: the store, what runs its items, and what clients see of it,
// built and ended in the right order.
//
//   BatchService ──► BatchStore ◄── BatchRunner ──► LocalCaller
//        ▲               │ on_change     ▲
//        └── ChangeHub ◄─┴───────────────┘
class BatchJobs {
 public:
  struct Options {
    std::filesystem::path directory;  // empty: no batch jobs; calls are told so
    BatchServiceOptions service;
    BatchRunner::Options runner;
  };

  // Opens the store. An error names the directory.
  static absl::StatusOr<std::unique_ptr<BatchJobs>> Open(Options options);
  // StopRunning. REQUIRES: the gRPC server is shut down.
  ~BatchJobs();

  grpc::Service* grpc_service() { return service_->grpc_service(); }

  // From now on jobs are taken and their items run. `caller` must outlive StopRunning. Call once.
  void Serve(std::shared_ptr<const ServedModel> model, LocalCaller* caller);

  // No job is taken and no item begun any more; what runs goes back to the store. Streams that
  // would go on end. Does not block.
  void StartDrain();
  // Ends every stream that is open.
  void AbortStreams(const absl::Status& status) { service_->AbortAll(status); }
  // Waits until nothing runs. Idempotent.
  void StopRunning();

  // Does not block.
  void WriteMetrics(MetricsWriter* out) const;

 private:
  explicit BatchJobs(Options options) : options_(std::move(options)) {}
  void OnChange(const std::vector<JobId>& jobs);

  const Options options_;
  ChangeHub hub_;
  BatchMetrics metrics_;
  mutable absl::Mutex mutex_;
  bool draining_ ABSL_GUARDED_BY(mutex_) = false;
  std::unique_ptr<BatchRunner> runner_ ABSL_GUARDED_BY(mutex_);  // null: not served yet, or stopped

  std::unique_ptr<BatchStore> store_;  // null: no batch jobs; its thread uses all of the above
  std::unique_ptr<BatchMetrics::Watch> watch_;
  std::unique_ptr<BatchService> service_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_JOBS_H_
