#include "server/serve.h"

#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/log.h"
#include "server/server.h"
#include "server/status.h"

namespace latentd {
namespace {

// SIGTERM and SIGINT of the process, and word from its other threads, as one thing to wait for.
class Events {
 public:
  // Blocks the signals in this thread and those that it begins.
  Events() {
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    LATENTD_CHECK(pthread_sigmask(SIG_BLOCK, &signals, nullptr) == 0);
    signal(SIGPIPE, SIG_IGN);
    signals_ = signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
    wake_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    LATENTD_CHECK(signals_ >= 0 && wake_ >= 0);
  }
  ~Events() {
    close(signals_);
    close(wake_);
  }

  // Ends a Wait(). Any thread.
  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(wake_, &one, sizeof(one));
  }

  // Waits for a signal, Wake() or the end of `timeout`. The signal's number; 0 if none came.
  int Wait(absl::Duration timeout) {
    pollfd fds[] = {{.fd = signals_, .events = POLLIN, .revents = 0},
                    {.fd = wake_, .events = POLLIN, .revents = 0}};
    const int timeout_ms = timeout == absl::InfiniteDuration()
                               ? -1
                               : static_cast<int>(absl::ToInt64Milliseconds(timeout));
    if (poll(fds, 2, timeout_ms) <= 0) return 0;
    uint64_t count = 0;
    [[maybe_unused]] const ssize_t drained = read(wake_, &count, sizeof(count));
    signalfd_siginfo info;
    return read(signals_, &info, sizeof(info)) == sizeof(info) ? static_cast<int>(info.ssi_signo)
                                                               : 0;
  }

 private:
  int signals_ = -1;
  int wake_ = -1;
};

// Kubernetes shows what stands in the termination log as the reason of a pod's end.
int Fail(const ServeConfig& config, const absl::Status& status) {
  const std::string message(status.message());
  LogEvent(spdlog::level::err, "failed: " + message,
           {{"code", absl::StatusCodeToString(status.code())}});
  if (!config.termination_log.empty()) {
    std::ofstream file(config.termination_log, std::ios::trunc);
    if (!(file << message << '\n') || !file.flush()) {
      LogEvent(spdlog::level::warn, "cannot write the termination log",
               {{"termination_log", config.termination_log}});
    }
  }
  return kServeFailed;
}

// Ends the process where a thread may hang in a step or in loading and cannot be joined.
[[noreturn]] void ExitNow(int exit_code) {
  ShutdownLogging();
  std::_Exit(exit_code);
}

// The engine is lost: its calls get what they are told, if their clients read, and no more time
// than that. Together well below five seconds.
[[noreturn]] void EndLost(const ServeConfig& config, Server* server) {
  const int exit_code = Fail(config, *server->lost());
  const absl::Time deadline = absl::Now() + absl::Seconds(2);
  while (server->num_active() > 0 && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(10));
  server->Stop(absl::Milliseconds(500));
  ExitNow(exit_code);
}

// Waits for the calls that run; cuts off what is left. The exit code.
int Drain(const ServeConfig& config, Events* events, Server* server) {
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
                     Events* events) {
  auto started = Server::Start(
      config, model, [events] { events->Wake(); }, std::move(loader));
  if (!started.ok()) return Fail(config, started.status());
  const std::unique_ptr<Server> server = *std::move(started);

  std::optional<absl::Status> load_status;
  int signal = 0;
  while (signal == 0) {
    load_status = server->load_status();
    if (load_status.has_value() && !load_status->ok()) return Fail(config, *load_status);
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
  Events events;
  InitLogging(config.log_format == "json" ? LogFormat::kJson : LogFormat::kText, config.log_level);
  const int exit_code = ServeUntilSignal(config, model, std::move(loader), &events);
  ShutdownLogging();
  return exit_code;
}

}  // namespace latentd
