#ifndef LATENTD_SERVER_HEALTH_H_
#define LATENTD_SERVER_HEALTH_H_

#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "grpc/health/v1/health.grpc.pb.h"

namespace latentd {

// The key of a liveness probe: SERVING as long as the process makes progress, loading included.
inline constexpr std::string_view kLivenessService = "liveness";

// grpc.health.v1.Health over two facts, both set by the Server:
//   ready  the key "" and every service: whether a call would be answered now
//   alive  the key "liveness"
//
// gRPC's own implementation calls "" SERVING while the model loads, has no List, and an open Watch
// holds up Server::Shutdown() until its deadline; hence this one. Any thread.
class HealthService final : public grpc::health::v1::Health::CallbackService {
 public:
  // `services`: the full names that share the readiness of "".
  explicit HealthService(std::vector<std::string> services);
  ~HealthService() override;

  void SetReady(bool ready);
  void SetAlive(bool alive);
  bool ready() const;
  bool alive() const;

  // Ends every open Watch, and later ones at once, with UNAVAILABLE.
  void EndWatches();

  grpc::ServerUnaryReactor* Check(grpc::CallbackServerContext* context,
                                  const grpc::health::v1::HealthCheckRequest* request,
                                  grpc::health::v1::HealthCheckResponse* response) override;
  grpc::ServerUnaryReactor* List(grpc::CallbackServerContext* context,
                                 const grpc::health::v1::HealthListRequest* request,
                                 grpc::health::v1::HealthListResponse* response) override;
  grpc::ServerWriteReactor<grpc::health::v1::HealthCheckResponse>* Watch(
      grpc::CallbackServerContext* context,
      const grpc::health::v1::HealthCheckRequest* request) override;

 private:
  using ServingStatus = grpc::health::v1::HealthCheckResponse::ServingStatus;
  class Watcher;

  ServingStatus StatusOf(std::string_view service) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Sets one of the facts below and tells the watchers.
  void Update(bool HealthService::*fact, bool value);

  const std::vector<std::string> services_;
  mutable absl::Mutex mutex_;
  bool ready_ ABSL_GUARDED_BY(mutex_) = false;
  bool alive_ ABSL_GUARDED_BY(mutex_) = true;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  std::set<Watcher*> watchers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_SERVER_HEALTH_H_
