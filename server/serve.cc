#include "server/serve.h"

#include <cstdlib>
#include <cstring>
#include <memory>
#include <optional>
#include <utility>

#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/log.h"
#include "server/process_events.h"
#include "server/process_exit.h"
#include "server/server.h"
#include "server/status.h"

namespace latentd {
namespace {

// Ends the process where a thread may hang in a step or in loading and cannot be joined.
[[noreturn]] void ExitNow(int exit_code) {
  ShutdownLogging();
  std::_Exit(exit_code);
}

// The engine is lost: its calls get what they are told, if their clients read, and no more time
// than that. Together well below five seconds.
[[noreturn]] void EndLost(const ServeConfig& config, Server* server) {
  const int exit_code = FailProcess(config, *server->lost());
  const absl::Time deadline = absl::Now() + absl::Seconds(2);
  while (server->num_active() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  server->Stop(absl::Milliseconds(500));
  ExitNow(exit_code);
}

// Waits for the calls that run; cuts off what is left. The exit code.
int Drain(const ServeConfig& config, ProcessEvents* events, Server* server) {
  server->StartDrain();
  LogEvent(spdlog::level::info, "draining",
           {{"calls", server->num_active()},
            {"drain_timeout", absl::FormatDuration(config.drain_timeout)}});
  const absl::Time deadline = absl::Now() + config.drain_timeout;
  int signal = 0;
  while (server->num_active() > 0 && absl::Now() < deadline && signal == 0 && !server->lost()) {
    signal = events->Wait(absl::Milliseconds(20));
  }
  if (server->lost()) EndLost(config, server);
  const int cut = server->num_active();
  if (cut > 0) {
    LogEvent(spdlog::level::warn, "drain ends: calls are cut off",
             {{"calls", cut}, {"because", signal != 0 ? "second signal" : "drain_timeout"}});
    server->CutCalls(WithRetryDelay(
        MakeError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down"),
        absl::Seconds(1)));
  }
  server->Stop(absl::Seconds(1));
  return cut > 0 ? kServeFailed : kServeOk;
}

int ServeUntilSignal(const ServeConfig& config, const ModelPath& model, Server::Loader loader,
                     ProcessEvents* events) {
  auto started = Server::Start(
      config, model, [events] { events->Wake(); }, std::move(loader));
  if (!started.ok()) return FailProcess(config, started.status());
  const std::unique_ptr<Server> server = *std::move(started);

  std::optional<absl::Status> load_status;
  int signal = 0;
  while (signal == 0) {
    load_status = server->load_status();
    if (load_status.has_value() && !load_status->ok()) return FailProcess(config, *load_status);
    if (server->lost()) EndLost(config, server.get());
    signal = events->Wait(absl::InfiniteDuration());
  }
  LogEvent(spdlog::level::info, "signal", {{"name", strsignal(signal)}});
  load_status = server->load_status();
  if (!load_status.has_value()) {
    server->Stop(absl::Milliseconds(100));
    LogEvent(spdlog::level::info, "stopped while loading", {});
    ExitNow(kServeOk);
  }
  const int exit_code = Drain(config, events, server.get());
  LogEvent(spdlog::level::info, "stopped", {{"exit_code", exit_code}});
  if (!server->alive()) ExitNow(exit_code);
  return exit_code;
}

}  // namespace

int RunServe(const ServeConfig& config, const ModelPath& model, Server::Loader loader) {
  ProcessEvents events;
  InitLogging(config.log_format == "json" ? LogFormat::kJson : LogFormat::kText, config.log_level);
  const int exit_code = ServeUntilSignal(config, model, std::move(loader), &events);
  ShutdownLogging();
  return exit_code;
}

}  // namespace latentd
