#ifndef LATENTD_SERVER_INFERENCE_SERVICE_H_
#define LATENTD_SERVER_INFERENCE_SERVICE_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "scheduler/engine_core.h"
#include "scheduler/request.h"
#include "server/request_observer.h"
#include "server/served_model.h"

namespace grpc {
class Service;
}  // namespace grpc

namespace latentd {

class LocalCaller;

struct ServiceOptions {
  // Generating calls that are open at once; one more is refused with RESOURCE_EXHAUSTED.
  int32_t max_concurrent_requests = 4096;
  // Threads that parse, render and encode requests, so that gRPC's own never do. >= 1.
  int32_t num_workers = 2;
  // Calls that wait for such a thread; one more is refused with RESOURCE_EXHAUSTED.
  int32_t max_queued_calls = 4096;
  // Threads that turn tokens into text and write it; each has a share of the calls. >= 1.
  int32_t num_output_threads = 2;
  // Obey ChatRequest.chat_template; else PERMISSION_DENIED.
  bool allow_request_chat_template = false;
};

// latentd.v1.InferenceService: checks a call, hands it to the core, turns the core's tokens into
// the call's text. Lives from before the model is loaded (calls are UNAVAILABLE then) to after the
// gRPC server is shut down and the core has stopped.
//
// Every method may be called from any thread and none blocks, the destructor aside.
class InferenceService {
 public:
  // `observer` must outlive the service.
  InferenceService(const ServiceOptions& options, RequestObserver* observer);
  // REQUIRES: the gRPC server is shut down (no call is open), every local call has ended, and no
  // core calls HandleEvents any more.
  ~InferenceService();

  // To be registered with a grpc::ServerBuilder, before or after SetServing.
  grpc::Service* grpc_service();

  // From now on calls are served. `core` must be made with HandleEvents as its on_events, and must
  // outlive the service: a call that was cancelled while a worker prepared it cancels in the core
  // after the gRPC server is done with it. Call once.
  void SetServing(std::shared_ptr<const ServedModel> model, EngineCore* core);

  // For requests of this process. Its calls are not among num_active(); AbortAll ends them too.
  LocalCaller* local_caller();

  // EngineCore::Callbacks::on_events.
  void HandleEvents(std::vector<SequenceEvent> events);

  // From now on new calls are refused with UNAVAILABLE; those that run go on.
  void StartDrain();

  // Generating calls that are open: with StartDrain, how many the drain still waits for.
  int32_t num_active() const;

  // Ends every generating call that is open with `status`, local ones too. A client that does not
  // read may hold its call open until the gRPC server's own shutdown deadline.
  void AbortAll(const absl::Status& status);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_INFERENCE_SERVICE_H_
