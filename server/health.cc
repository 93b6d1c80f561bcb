#include "server/health.h"

#include <algorithm>
#include <utility>

#include "engine/status.h"

namespace latentd {

using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using grpc::health::v1::HealthListRequest;
using grpc::health::v1::HealthListResponse;

// One Watch call. The service's mutex guards its state. Operations are started without the lock, by
// whoever set `busy_` under it: while it is set nobody else starts one, and the call cannot end.
class HealthService::Watcher final : public grpc::ServerWriteReactor<HealthCheckResponse> {
 public:
  enum class Operation { kNone, kWrite, kFinish };

  Watcher(HealthService* health, std::string service)
      : health_(health), service_(std::move(service)) {}

  // Decides what is due and reserves it. REQUIRES: the service's mutex is held.
  Operation Reserve() {
    if (busy_ || finished_) return Operation::kNone;
    if (cancelled_ || health_->ended_) {
      busy_ = finished_ = true;
      return Operation::kFinish;
    }
    const ServingStatus status = health_->StatusOf(service_);
    if (status == sent_) return Operation::kNone;
    busy_ = true;
    sent_ = status;
    response_.set_status(status);
    return Operation::kWrite;
  }

  // Starts what Reserve() returned. Without the lock.
  void Start(Operation operation) {
    if (operation == Operation::kWrite) StartWrite(&response_);
    if (operation == Operation::kFinish) {
      Finish(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the server is shutting down"));
    }
  }

  void OnWriteDone(bool ok) override {
    Operation operation;
    {
      absl::MutexLock lock(&health_->mutex_);
      busy_ = false;
      cancelled_ = cancelled_ || !ok;
      operation = Reserve();
    }
    Start(operation);
  }

  void OnCancel() override {
    Operation operation;
    {
      absl::MutexLock lock(&health_->mutex_);
      cancelled_ = true;
      operation = Reserve();
    }
    Start(operation);
  }

  void OnDone() override {
    {
      absl::MutexLock lock(&health_->mutex_);
      health_->watchers_.erase(this);
    }
    delete this;
  }

 private:
  HealthService* const health_;
  const std::string service_;
  HealthCheckResponse response_;  // gRPC's while a write is under way
  bool busy_ = false;
  bool finished_ = false;
  bool cancelled_ = false;
  ServingStatus sent_ = HealthCheckResponse::UNKNOWN;  // nothing yet
};

HealthService::HealthService(std::vector<std::string> services) : services_(std::move(services)) {}

HealthService::~HealthService() {
  absl::MutexLock lock(&mutex_);
  LATENTD_CHECK(watchers_.empty());  // the gRPC server that calls us is gone
}

HealthService::ServingStatus HealthService::StatusOf(std::string_view service) const {
  if (service == kLivenessService) {
    return alive_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  }
  if (service.empty() ||
      std::find(services_.begin(), services_.end(), service) != services_.end()) {
    return ready_ ? HealthCheckResponse::SERVING : HealthCheckResponse::NOT_SERVING;
  }
  return HealthCheckResponse::SERVICE_UNKNOWN;
}

void HealthService::Update(bool HealthService::*fact, bool value) {
  std::vector<std::pair<Watcher*, Watcher::Operation>> due;
  {
    absl::MutexLock lock(&mutex_);
    this->*fact = value;
    for (Watcher* watcher : watchers_) {
      const Watcher::Operation operation = watcher->Reserve();
      if (operation != Watcher::Operation::kNone) due.emplace_back(watcher, operation);
    }
  }
  for (const auto& [watcher, operation] : due) watcher->Start(operation);
}

void HealthService::SetReady(bool ready) { Update(&HealthService::ready_, ready); }
void HealthService::SetAlive(bool alive) { Update(&HealthService::alive_, alive); }
void HealthService::EndWatches() { Update(&HealthService::ended_, true); }

bool HealthService::ready() const {
  absl::MutexLock lock(&mutex_);
  return ready_;
}

bool HealthService::alive() const {
  absl::MutexLock lock(&mutex_);
  return alive_;
}

grpc::ServerUnaryReactor* HealthService::Check(grpc::CallbackServerContext* context,
                                               const HealthCheckRequest* request,
                                               HealthCheckResponse* response) {
  ServingStatus status;
  {
    absl::MutexLock lock(&mutex_);
    status = StatusOf(request->service());
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  if (status == HealthCheckResponse::SERVICE_UNKNOWN) {
    reactor->Finish(grpc::Status(grpc::StatusCode::NOT_FOUND, "unknown service"));
  } else {
    response->set_status(status);
    reactor->Finish(grpc::Status::OK);
  }
  return reactor;
}

grpc::ServerUnaryReactor* HealthService::List(grpc::CallbackServerContext* context,
                                              const HealthListRequest*,
                                              HealthListResponse* response) {
  {
    absl::MutexLock lock(&mutex_);
    auto& statuses = *response->mutable_statuses();
    statuses[""].set_status(StatusOf(""));
    statuses[std::string(kLivenessService)].set_status(StatusOf(kLivenessService));
    for (const std::string& service : services_) statuses[service].set_status(StatusOf(service));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerWriteReactor<HealthCheckResponse>* HealthService::Watch(
    grpc::CallbackServerContext*, const HealthCheckRequest* request) {
  auto* watcher = new Watcher(this, request->service());
  Watcher::Operation operation;
  {
    absl::MutexLock lock(&mutex_);
    watchers_.insert(watcher);
    operation = watcher->Reserve();
  }
  watcher->Start(operation);
  return watcher;
}

}  // namespace latentd
