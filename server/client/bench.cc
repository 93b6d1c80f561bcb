#include "server/client/bench.h"

#include <unistd.h>

#include <fstream>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <utility>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "latentd/v1/inference.grpc.pb.h"
#include "server/client/bench_report.h"
#include "server/client/load_generator.h"
#include "server/client/workload.h"

namespace latentd {
namespace {

// Without a terminal a line this often is enough: logs keep every one.
constexpr int kLogEverySeconds = 10;

// Asks what is served, and waits for a server that loads.
grpc::Status GetModel(const BenchOptions& options, const Interrupts& interrupts, std::ostream& err,
                      v1::Model* model) {
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(options.connection);
  const auto stub = v1::InferenceService::NewStub(channel);
  ServerWait wait(options.connection, *channel, interrupts, err);
  while (true) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    const OnInterrupt cancel(interrupts, [&context] { context.TryCancel(); });
    v1::GetModelRequest request;
    request.set_model(options.model);
    v1::GetModelResponse response;
    const grpc::Status status = stub->GetModel(&context, request, &response);
    if (status.ok()) *model = std::move(*response.mutable_model());
    if (status.ok() || !wait.TryAgain(status)) return status;
  }
}

// Shows a line of progress: rewritten in place on a terminal, now and then elsewhere.
class ProgressLine {
 public:
  ProgressLine(const BenchOptions& options, bool is_terminal, std::ostream& err)
      : quiet_(options.quiet), is_terminal_(is_terminal), err_(err) {}

  void Show(absl::string_view phase, const LoadProgress& now) {
    const double seconds = now.elapsed_s - std::exchange(last_s_, now.elapsed_s);
    const int64_t deltas = now.num_deltas - std::exchange(last_deltas_, now.num_deltas);
    if (quiet_ || (!is_terminal_ && ++num_calls_ % kLogEverySeconds != 0)) return;
    err_ << (is_terminal_ ? "\r\x1b[K" : "")
         << absl::StrFormat("%s: %.0f s, %d sent, %d completed, %d failed, %d under way", phase,
                            now.elapsed_s, now.num_sent, now.num_completed, now.num_failed,
                            now.num_in_flight);
    if (seconds > 0 && deltas > 0) err_ << absl::StrFormat(", %.0f deltas/s", deltas / seconds);
    err_ << (is_terminal_ ? "" : "\n") << std::flush;
    shown_ = true;
  }

  // Before anything else is written; the next phase starts at zero.
  void End() {
    if (shown_ && is_terminal_) err_ << "\r\x1b[K" << std::flush;
    shown_ = false;
    num_calls_ = 0;
    last_s_ = 0;
    last_deltas_ = 0;
  }

 private:
  const bool quiet_;
  const bool is_terminal_;
  std::ostream& err_;
  bool shown_ = false;
  int num_calls_ = 0;
  double last_s_ = 0;
  int64_t last_deltas_ = 0;
};

absl::Status WriteReport(const BenchOptions& options, const nlohmann::json& report,
                         std::ostream& out) {
  // Messages come from the server; a byte that is no UTF-8 must not lose the report.
  const std::string text =
      report.dump(2, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  if (options.output.empty()) {
    out << text << std::flush;
    return out ? absl::OkStatus() : absl::DataLossError("cannot write to standard output");
  }
  std::ofstream file(options.output);
  file << text << std::flush;
  return file ? absl::OkStatus()
              : absl::DataLossError(absl::StrCat("--output: cannot write ", options.output));
}

int Fail(int exit_code, absl::string_view message, std::ostream& err) {
  err << "error: " << message << std::endl;
  return exit_code;
}

LoadResult RunPhase(const LoadGenerator::Plan& plan, absl::string_view phase,
                    LoadGenerator& generator, ProgressLine& line) {
  LoadResult result =
      generator.Run(plan, [&](const LoadProgress& progress) { line.Show(phase, progress); });
  line.End();
  return result;
}

}  // namespace

int RunBench(BenchOptions options, bool err_is_terminal, std::ostream& out, std::ostream& err) {
  if (absl::Status valid = FinishBenchOptions(&options); !valid.ok()) {
    return Fail(kExitUsage, valid.message(), err);
  }
  if (!options.output.empty() && !std::ofstream(options.output, std::ios::app)) {
    // Now, rather than after an hour of load.
    return Fail(kExitUsage, absl::StrCat("--output: cannot write ", options.output), err);
  }
  Interrupts interrupts;
  v1::Model model;
  if (grpc::Status status = GetModel(options, interrupts, err, &model); !status.ok()) {
    if (interrupts.pending()) return kExitInterrupted;
    return Fail(kExitFailed, DescribeError(status), err);
  }
  std::random_device entropy;
  if (options.cache_salt.empty()) options.cache_salt = absl::StrFormat("bench-%08x", entropy());
  absl::StatusOr<Workload> workload = Workload::Make(options, model);
  if (!workload.ok()) return Fail(kExitUsage, workload.status().message(), err);

  LoadGenerator generator(options, *workload, interrupts);
  ProgressLine line(options, err_is_terminal, err);
  if (options.warmup > 0) {
    // In closed loop also before an open one: it opens the connections and fills the caches.
    const LoadGenerator::Plan warmup = {
        .num_requests = options.warmup,
        .concurrency = options.concurrency > 0 ? options.concurrency : options.connections,
        .first_index = -options.warmup};
    const LoadResult result = RunPhase(warmup, "warm-up", generator, line);
    if (interrupts.pending()) return kExitInterrupted;
    if (result.num_failed() == options.warmup) {
      return Fail(
          kExitFailed,
          absl::StrCat("every warm-up request failed: ", result.errors.begin()->second.message),
          err);
    }
  }
  const std::string started_at =
      absl::FormatTime("%Y-%m-%dT%H:%M:%SZ", absl::Now(), absl::UTCTimeZone());
  LoadResult result = RunPhase({.num_requests = options.num_requests,
                                .duration_s = options.duration_s,
                                .concurrency = options.concurrency,
                                .request_rate = options.request_rate},
                               "running", generator, line);
  const bool interrupted = interrupts.pending();
  const nlohmann::json report = MakeReport(options, model, started_at, interrupted, &result);
  if (!options.quiet) err << FormatReport(report) << std::flush;
  if (absl::Status written = WriteReport(options, report, out); !written.ok()) {
    return Fail(kExitFailed, written.message(), err);
  }
  if (interrupted) return kExitInterrupted;
  if (const double rate = report["requests"]["error_rate"]; rate > options.max_error_rate) {
    return Fail(kExitFailed,
                absl::StrFormat("%.2f %% of the requests failed; --max-error-rate allows %.2f %%",
                                100 * rate, 100 * options.max_error_rate),
                err);
  }
  return kExitOk;
}

void RegisterBenchCommand(CLI::App& app, int* exit_code) {
  CLI::App* bench = app.add_subcommand("bench", "Benchmarks");
  bench->require_subcommand(1);
  CLI::App* serve = bench->add_subcommand("serve", "Put load on a running server and measure it");
  const auto options = std::make_shared<BenchOptions>();
  AddBenchOptions(*serve, options.get());
  serve->callback([options, exit_code] {
    *exit_code = RunBench(*options, isatty(STDERR_FILENO) != 0, std::cout, std::cerr);
  });
}

}  // namespace latentd
