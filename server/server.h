#ifndef LATENTD_SERVER_SERVER_H_
#define LATENTD_SERVER_SERVER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/server.h"
#include "scheduler/engine_core.h"
#include "server/batch/batch_jobs.h"
#include "server/config.h"
#include "server/health.h"
#include "server/http.h"
#include "server/inference_service.h"
#include "server/metrics.h"
#include "server/model_loader.h"
#include "server/watchdog.h"

namespace latentd {

// The daemon, without the process around it: no signals, no exit. It is its members, in the order
// in which they are built; they end in the reverse order.
//
// The ports open first and health tells the truth from then on; the model is loaded by a thread of
// its own. Methods are for one thread, the owner's.
class Server {
 public:
  // What loads: LoadModel(), but for tests that bring an engine of their own.
  using Loader = std::function<absl::StatusOr<LoadedModel>(const ServeConfig&, const ModelPath&,
                                                           LoadListener*)>;

  // Opens the store of batch jobs and the ports, and begins to load. `on_change` is called when
  // load_status() has its value, and when lost() has one, by threads of the server. An error names
  // the directory or the address.
  static absl::StatusOr<std::unique_ptr<Server>> Start(const ServeConfig& config, ModelPath model,
                                                       std::function<void()> on_change,
                                                       Loader loader = LoadModel);
  // Stop(), and waits for the loading thread.
  ~Server();

  int grpc_port() const { return grpc_port_; }
  int http_port() const { return http_ == nullptr ? 0 : http_->port(); }
  // nullopt while the model is loading; then OK, which is serving, or why it could not be loaded.
  std::optional<absl::Status> load_status() const;
  // Why the engine will compute nothing any more; nullopt as long as it may. By then health is
  // NOT_SERVING, and every call is being ended with this UNAVAILABLE. Its thread may hang for ever:
  // what is left is to end the process.
  std::optional<absl::Status> lost() const;
  // False while the loading moves nothing for longer than config.step_deadline, and once the engine
  // is lost.
  bool alive() const { return health_.alive(); }

  // From now on readiness is NOT_SERVING and new calls are UNAVAILABLE; running calls go on. Items
  // of batch jobs do not: they are in the store.
  void StartDrain();
  // Generating calls that still run.
  int num_active() const { return service_.num_active(); }
  // Ends the calls that still run.
  void CutCalls(const absl::Status& status) { service_.AbortAll(status); }
  // Closes the ports; calls that are still open then are cancelled after `grace`. Idempotent.
  void Stop(absl::Duration grace);

 private:
  class Observer;
  class Progress;

  Server(const ServeConfig& config, ModelPath model, Loader loader);
  absl::Status Listen();
  void Load();
  absl::Status LoadAndServe();
  void OnStuck(bool stuck, absl::Duration busy);
  void OnLost(const absl::Status& why);
  void OnEngineReady(bool ready);
  void SetState(ServerState state);
  void UpdateHealth() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ServeConfig config_;
  const ModelPath model_;
  const Loader load_model_;
  std::function<void()> on_change_;

  mutable absl::Mutex mutex_;
  ServerState state_ ABSL_GUARDED_BY(mutex_) = ServerState::kStarting;
  bool alive_ ABSL_GUARDED_BY(mutex_) = true;
  bool engine_ready_ ABSL_GUARDED_BY(mutex_) = true;
  std::optional<absl::Status> load_status_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> lost_ ABSL_GUARDED_BY(mutex_);
  std::atomic<int64_t> load_moved_ns_{0};  // when loading last moved, Unix time; 0: not loading

  Metrics metrics_;
  std::unique_ptr<Observer> observer_;
  std::unique_ptr<Cluster> cluster_;  // null: the engine is in this process
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<EngineCore> core_;  // outlives the service, whose last calls may cancel in it
  InferenceService service_;
  std::unique_ptr<BatchJobs> batch_;  // its items are calls of the service
  HealthService health_;
  std::atomic<EngineCore*> running_core_{nullptr};  // for the watchdog
  std::unique_ptr<Watchdog> watchdog_;
  std::unique_ptr<HttpServer> http_;
  std::unique_ptr<grpc::Server> grpc_;
  int grpc_port_ = 0;
  std::thread loader_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_SERVER_H_
