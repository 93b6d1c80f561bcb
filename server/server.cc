#include "server/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "engine/status.h"
#include "fmt/format.h"
#include "server/log.h"
#include "server/status.h"
#include "server/version.h"

namespace latentd {
namespace {

int Milliseconds(absl::Duration duration) {
  return static_cast<int>(
      std::min<int64_t>(absl::ToInt64Milliseconds(duration), std::numeric_limits<int>::max()));
}

// What a connection may do: notes on each are with the keys in config.cc.
void SetChannelArguments(const ServeConfig& config, grpc::ServerBuilder* builder) {
  // Two daemons on one port would silently share its connections.
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->SetMaxReceiveMessageSize(static_cast<int>(config.max_message_bytes));
  builder->SetMaxSendMessageSize(-1);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, Milliseconds(config.keepalive_time));
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                              Milliseconds(config.keepalive_timeout));
  // A long prefill sends nothing for tens of seconds, so clients ping, between calls too.
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                              Milliseconds(config.min_ping_interval));
  if (config.max_connection_age > absl::ZeroDuration()) {
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS,
                                Milliseconds(config.max_connection_age));
    builder->AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                                Milliseconds(config.drain_timeout));
  }
}

BatchJobs::Options BatchOptions(const ServeConfig& config) {
  BatchJobs::Options options;
  options.directory = config.batch_dir;
  options.service.limits = {.max_item_bytes = config.batch_max_item_bytes,
                            .max_job_items = config.batch_max_job_items,
                            .max_jobs = config.batch_max_jobs,
                            .max_items = config.batch_max_items,
                            .result_ttl = config.batch_result_ttl,
                            .allow_request_chat_template = config.allow_request_chat_template};
  options.runner.max_running = static_cast<int32_t>(config.batch_max_running);
  options.runner.upload_ttl = config.batch_upload_ttl;
  return options;
}

double ToMilliseconds(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

}  // namespace

// Requests become metrics, and each one line of the log.
class Server::Observer final : public RequestObserver {
 public:
  explicit Observer(Metrics* metrics) : metrics_(metrics) {}

  void OnFinished(const RequestRecord& record) override {
    metrics_->OnFinished(record);
    std::vector<LogField> fields = {{"id", record.request_id},
                                    {"method", record.method},
                                    {"code", absl::StatusCodeToString(record.code)}};
    if (!record.reason.empty()) fields.emplace_back("reason", record.reason);
    if (!record.finish_reason.empty()) fields.emplace_back("finish", record.finish_reason);
    fields.emplace_back("prompt_tokens", record.prompt_tokens);
    fields.emplace_back("cached_tokens", record.cached_tokens);
    fields.emplace_back("completion_tokens", record.completion_tokens);
    if (record.reasoning_tokens > 0) {
      fields.emplace_back("reasoning_tokens", record.reasoning_tokens);
    }
    if (record.queue) fields.emplace_back("queue_ms", ToMilliseconds(*record.queue));
    if (record.time_to_first_token) {
      fields.emplace_back("ttft_ms", ToMilliseconds(*record.time_to_first_token));
    }
    fields.emplace_back("duration_ms", ToMilliseconds(record.total));
    std::vector<std::string> names;  // LogField keeps no copy of its key
    names.reserve(record.metadata.size());
    for (const auto& [name, value] : record.metadata) {
      fields.emplace_back(names.emplace_back("metadata." + name), value);
    }
    LogEvent(spdlog::level::info, "request", fields);
  }
  void OnRejected(std::string_view reason) override { metrics_->OnRejected(reason); }
  void OnFirstToken(absl::Duration since_arrival) override {
    metrics_->OnFirstToken(since_arrival);
  }
  void OnTokens(absl::Duration since_last, int64_t count) override {
    metrics_->OnTokens(since_last, count);
  }

 private:
  Metrics* const metrics_;
};

// Loading, as metrics, as life for the watchdog, and shown: a bar on a terminal, else log lines.
class Server::Progress final : public LoadListener {
 public:
  explicit Progress(Server* server) : server_(server), terminal_(isatty(STDERR_FILENO) == 1) {}
  ~Progress() override { EndPhase(); }

  void OnPhase(std::string_view phase) override {
    EndPhase();
    phase_ = phase;
    phase_began_ = absl::Now();
    server_->load_moved_ns_ = absl::ToUnixNanos(phase_began_);
    LogEvent(spdlog::level::debug, "load", {{"phase", phase}});
    if (phase == "warmup") server_->SetState(ServerState::kWarming);
  }

  void OnProgress(uint64_t loaded_bytes, uint64_t total_bytes) override {
    const absl::Time now = absl::Now();
    server_->load_moved_ns_ = absl::ToUnixNanos(now);
    server_->metrics_.SetLoadProgress(loaded_bytes, total_bytes);
    const bool last = loaded_bytes == total_bytes;
    if (!last && now < next_shown_) return;
    next_shown_ = now + (terminal_ ? absl::Milliseconds(100) : absl::Seconds(5));
    const double share = total_bytes == 0 ? 1 : static_cast<double>(loaded_bytes) / total_bytes;
    const double gigabytes = static_cast<double>(loaded_bytes) * 1e-9;
    if (terminal_) {
      constexpr int kWidth = 40;
      const int filled = static_cast<int>(share * kWidth);
      fmt::print(stderr, "\r\x1b[Kloading weights [{:#<{}}{:.<{}}] {:3.0f}% {:.1f} of {:.1f} GB{}",
                 "", filled, "", kWidth - filled, share * 100, gigabytes, total_bytes * 1e-9,
                 last ? "\n" : "");
      std::fflush(stderr);
    } else {
      const double seconds = absl::ToDoubleSeconds(now - phase_began_);
      LogEvent(spdlog::level::info, "loading weights",
               {{"percent", share * 100},
                {"gigabytes", gigabytes},
                {"gigabytes_per_second", seconds > 0 ? gigabytes / seconds : 0}});
    }
  }

  void OnWaiting() override { server_->load_moved_ns_ = absl::GetCurrentTimeNanos(); }

  void OnPlan(const std::string& table) override {
    for (size_t begin = 0; begin < table.size();) {
      const size_t end = std::min(table.find('\n', begin), table.size());
      LogEvent(spdlog::level::info, table.substr(begin, end - begin), {});
      begin = end + 1;
    }
  }

  void EndPhase() {
    if (phase_.empty()) return;
    server_->metrics_.SetStartupPhase(phase_, absl::Now() - phase_began_);
    phase_.clear();
  }

 private:
  Server* const server_;
  const bool terminal_;
  std::string phase_;
  absl::Time phase_began_;
  absl::Time next_shown_ = absl::InfinitePast();
};

Server::Server(const ServeConfig& config, ModelPath model, Loader loader)
    : config_(config),
      model_(std::move(model)),
      load_model_(std::move(loader)),
      metrics_(model_.name),
      observer_(std::make_unique<Observer>(&metrics_)),
      service_({.max_concurrent_requests = static_cast<int32_t>(config.max_concurrent_requests),
                .allow_request_chat_template = config.allow_request_chat_template},
               observer_.get()),
      health_({"latentd.v1.InferenceService"}) {}

Server::~Server() {
  Stop(absl::ZeroDuration());
  if (loader_.joinable()) loader_.join();
  if (batch_) batch_->StopRunning();  // while the core still ends what it cancels
  if (core_) core_->Stop();           // its events go to the service, which is destroyed first
}

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const ServeConfig& config, ModelPath model,
                                                      std::function<void()> on_change,
                                                      Loader loader) {
  auto server = std::unique_ptr<Server>(new Server(config, std::move(model), std::move(loader)));
  server->on_change_ = std::move(on_change);
  ASSIGN_OR_RETURN(server->batch_, BatchJobs::Open(BatchOptions(config)));
  server->metrics_.SetBatch(
      [batch = server->batch_.get()](MetricsWriter* out) { batch->WriteMetrics(out); });
  RETURN_IF_ERROR(server->Listen());
  server->SetState(ServerState::kLoading);
  server->load_moved_ns_ = absl::GetCurrentTimeNanos();
  server->watchdog_ = std::make_unique<Watchdog>(Watchdog::Options{
      .deadline = config.step_deadline,
      .busy_since =
          [self = server.get()] {
            // A group's leader judges its steps itself: there they do not end the daemon.
            if (self->running_core_ != nullptr && self->cluster_ != nullptr) {
              return absl::InfinitePast();
            }
            if (EngineCore* core = self->running_core_) return core->stats().step_started_at;
            const int64_t moved = self->load_moved_ns_;
            return moved == 0 ? absl::InfinitePast() : absl::FromUnixNanos(moved);
          },
      .on_change = [self = server.get()](bool stuck,
                                         absl::Duration busy) { self->OnStuck(stuck, busy); }});
  server->loader_ = std::thread([self = server.get()] { self->Load(); });
  return server;
}

absl::Status Server::Listen() {
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::ServerBuilder builder;
  SetChannelArguments(config_, &builder);
  builder.AddListeningPort(config_.listen, grpc::InsecureServerCredentials(), &grpc_port_);
  builder.RegisterService(service_.grpc_service());
  builder.RegisterService(batch_->grpc_service());
  builder.RegisterService(&health_);
  grpc_ = builder.BuildAndStart();
  if (grpc_ == nullptr || grpc_port_ == 0) {
    return absl::UnavailableError(fmt::format(
        "cannot listen on '{}': the port is in use, or the address is not one of this machine",
        config_.listen));
  }
  if (!config_.http_listen.empty()) {
    const auto health = [](bool ok) {
      return HttpServer::Response{.code = ok ? 200 : 503, .body = ok ? "ok\n" : "not serving\n"};
    };
    const auto ready = [this, health] { return health(health_.ready()); };
    ASSIGN_OR_RETURN(
        http_, HttpServer::Start(config_.http_listen,
                                 {{"/healthz", ready},
                                  {"/readyz", ready},
                                  {"/livez", [this, health] { return health(health_.alive()); }},
                                  {"/metrics", [this] {
                                     return HttpServer::Response{
                                         .content_type = "text/plain; version=0.0.4; charset=utf-8",
                                         .body = metrics_.Text()};
                                   }}}));
  }
  LogEvent(spdlog::level::info, "listening",
           {{"grpc", config_.listen},
            {"grpc_port", grpc_port_},
            {"http", config_.http_listen},
            {"http_port", http_port()},
            {"version", kVersion}});
  return absl::OkStatus();
}

void Server::Load() {
  const absl::Time begin = absl::Now();
  const absl::Status status = LoadAndServe();
  load_moved_ns_ = 0;
  if (status.ok()) {
    const EngineInfo info = engine_->info();
    LogEvent(spdlog::level::info, "serving",
             {{"model", model_.name},
              {"max_model_len", info.max_model_len},
              {"kv_cache_tokens", int64_t{info.num_blocks} * kBlockSize * info.num_dp_ranks},
              {"startup_seconds", absl::ToDoubleSeconds(absl::Now() - begin)}});
  }
  {
    absl::MutexLock lock(&mutex_);
    load_status_ = status;
  }
  if (on_change_) on_change_();
}

// The watchdog's thread. A step that is stuck will not come back: collectives and kernels have no
// deadline of their own.
void Server::OnStuck(bool stuck, absl::Duration busy) {
  LogEvent(stuck ? spdlog::level::err : spdlog::level::warn,
           stuck ? "no progress: a step or the loading is stuck" : "progress again",
           {{"seconds", absl::ToDoubleSeconds(busy)},
            {"step_deadline", absl::FormatDuration(config_.step_deadline)}});
  if (stuck && running_core_ != nullptr) {
    OnLost(absl::UnavailableError(
        fmt::format("the engine failed: rank 0: Execute: a step has not returned for {}; "
                    "step_deadline is {}",
                    absl::FormatDuration(absl::Trunc(busy, absl::Milliseconds(1))),
                    absl::FormatDuration(config_.step_deadline))));
    return;
  }
  absl::MutexLock lock(&mutex_);
  alive_ = !stuck && !lost_;
  UpdateHealth();
}

// The core's thread: the group of ranks is whole, or is being formed again.
void Server::OnEngineReady(bool ready) {
  LogEvent(ready ? spdlog::level::info : spdlog::level::warn,
           ready ? "serving again" : "not serving: the ranks form their group again", {});
  absl::MutexLock lock(&mutex_);
  engine_ready_ = ready;
  UpdateHealth();
}

// The core's thread, or the watchdog's. First health, so that nobody new is sent here.
void Server::OnLost(const absl::Status& why) {
  {
    absl::MutexLock lock(&mutex_);
    if (lost_) return;
    lost_ = MakeError(absl::StatusCode::kUnavailable, "ENGINE_LOST", why.message());
    alive_ = false;
    UpdateHealth();
  }
  service_.StartDrain();
  // Before the batch jobs drain: an item that was in the engine when it was lost may be the reason,
  // and is not given back as if it had never been begun.
  service_.AbortAll(*lost());
  batch_->StartDrain();
  if (on_change_) on_change_();
}

std::optional<absl::Status> Server::lost() const {
  absl::MutexLock lock(&mutex_);
  return lost_;
}

absl::Status Server::LoadAndServe() {
  Progress progress(this);
  ASSIGN_OR_RETURN(LoadedModel loaded, load_model_(config_, model_, &progress));
  progress.EndPhase();
  cluster_ = std::move(loaded.cluster);
  engine_ = std::move(loaded.engine);
  if (cluster_ != nullptr) {
    metrics_.SetCluster([cluster = cluster_.get()] { return cluster->stats(); });
  }
  core_ = std::make_unique<EngineCore>(
      SchedulerConfig{.max_step_tokens = static_cast<int32_t>(config_.max_step_tokens),
                      .max_running = static_cast<int32_t>(config_.max_running),
                      .max_waiting = static_cast<int32_t>(config_.max_waiting),
                      .prefix_caching = config_.prefix_caching,
                      .max_recoveries = static_cast<int32_t>(config_.max_recoveries),
                      .max_background_tokens = static_cast<int32_t>(config_.batch_step_tokens)},
      engine_.get(),
      EngineCore::Callbacks{
          .on_events =
              [this](std::vector<SequenceEvent> events) {
                service_.HandleEvents(std::move(events));
              },
          .on_step = [this](const StepReport& report) { metrics_.OnStep(report); },
          .on_lost = [this](const absl::Status& why) { OnLost(why); },
          .on_ready_change = [this](bool ready) { OnEngineReady(ready); }},
      config_.recovery_timeout);
  running_core_ = core_.get();
  metrics_.SetEngine(engine_->info(), std::string(EngineName(loaded.engine_kind)),
                     config_.prefix_caching, [core = core_.get()] { return core->stats(); });
  service_.SetServing(loaded.served, core_.get());
  batch_->Serve(std::move(loaded.served), service_.local_caller());
  SetState(ServerState::kServing);
  return absl::OkStatus();
}

std::optional<absl::Status> Server::load_status() const {
  absl::MutexLock lock(&mutex_);
  return load_status_;
}

// States only go forward: a model that is loaded while the daemon drains is not served.
void Server::SetState(ServerState state) {
  absl::MutexLock lock(&mutex_);
  if (state <= state_) return;
  state_ = state;
  UpdateHealth();
}

void Server::UpdateHealth() {
  metrics_.SetState(state_);
  metrics_.SetAlive(alive_);
  metrics_.SetEngineReady(engine_ready_);
  health_.SetAlive(alive_);
  health_.SetReady(state_ == ServerState::kServing && alive_ && engine_ready_);
}

void Server::StartDrain() {
  SetState(ServerState::kDraining);
  service_.StartDrain();
  batch_->StartDrain();
}

void Server::Stop(absl::Duration grace) {
  SetState(ServerState::kDraining);
  SetState(ServerState::kStopped);
  if (grpc_ != nullptr) {
    health_.EndWatches();
    batch_->AbortStreams(
        MakeError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down"));
    grpc_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
    grpc_.reset();
  }
  http_.reset();
}

}  // namespace latentd
