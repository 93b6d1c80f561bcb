// What the serving path costs without a model: gRPC, output thread, text, scheduler, core thread,
// with an engine of zero compute. Two processes on one host: a server, whose processor time counts,
// and a client that reads every stream. Prints one JSON object.
//
//   overhead_bench --streams 2048 --period-ms 100    paced: nearly every delta carries one token
//   overhead_bench --streams 2048 --period-ms 0      unpaced: deltas join

#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpcpp/grpcpp.h"
#include "nlohmann/json.hpp"
#include "scheduler/engine_core.h"
#include "server/inference_service.h"
#include "tests/server/overhead/clock_engine.h"
#include "tests/server/overhead/load.h"

namespace latentd {
namespace {

struct BenchOptions {
  std::string model = "deploy/demo-model";
  int streams = 2048;
  int connections = 8;
  int output_threads = ServiceOptions().num_output_threads;
  double period_ms = 100;
  double warmup_s = 3;
  double seconds = 10;
  bool serve = false;
};

class NoObserver : public RequestObserver {
 public:
  void OnFinished(const RequestRecord&) override {}
  void OnRejected(std::string_view) override {}
  void OnFirstToken(absl::Duration) override {}
  void OnTokens(absl::Duration, int64_t) override {}
};

// The server process: prints its port, ends when its standard input does.
int Serve(const BenchOptions& options) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  // As the daemon does: distributions' absl looks for lock cycles, in a graph under one global
  // lock.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  const EngineInfo info = {.num_blocks = 200000,
                           .num_dp_ranks = 1,
                           .max_step_tokens = 16384,
                           .max_sequences = options.streams,
                           .max_model_len = 100000,
                           .vocab_size = 4096};
  auto model = std::make_shared<ServedModel>();
  model->name = "demo";
  model->max_model_len = info.max_model_len;
  model->vocab_size = info.vocab_size;
  auto tokenizer = Tokenizer::Load(options.model);
  if (!tokenizer.ok()) {
    std::cerr << tokenizer.status() << "\n";
    return 1;
  }
  model->tokenizer = *tokenizer;
  model->chat_template =
      *ChatTemplate::Compile(model->tokenizer->chat_template(), model->tokenizer);

  ClockEngine engine(info, absl::Milliseconds(options.period_ms));
  NoObserver observer;
  ServiceOptions service_options;
  service_options.num_output_threads = options.output_threads;
  std::unique_ptr<EngineCore> core;  // outlives the service
  InferenceService service(service_options, &observer);
  core = std::make_unique<EngineCore>(
      SchedulerConfig{.max_step_tokens = info.max_step_tokens,
                      .max_running = options.streams,
                      .max_waiting = options.streams,
                      .prefix_caching = true},
      &engine,
      EngineCore::Callbacks{.on_events =
                                [&service](std::vector<SequenceEvent> events) {
                                  service.HandleEvents(std::move(events));
                                },
                            .on_step = nullptr});
  service.SetServing(model, core.get());
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(service.grpc_service());
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  std::cout << port << std::endl;
  std::cin.get();
  server->Shutdown(std::chrono::system_clock::now());
  server->Wait();
  core->Stop();
  return 0;
}

// User and system time of a process.
absl::Duration ProcessorTime(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/stat"));
  std::string stat((std::istreambuf_iterator<char>(file)), {});
  std::istringstream fields(stat.substr(stat.rfind(')') + 2));
  std::string skip;
  for (int i = 0; i < 11; ++i) fields >> skip;
  int64_t user = 0, system = 0;
  fields >> user >> system;
  return absl::Seconds(static_cast<double>(user + system) / sysconf(_SC_CLK_TCK));
}

double LatencyMs(const std::vector<int32_t>& histogram, int64_t tokens, double quantile) {
  int64_t below = 0;
  size_t tick = 0;
  while (tick + 1 < histogram.size() && (below += histogram[tick]) < quantile * tokens) ++tick;
  return absl::ToDoubleMilliseconds(TokenClock::kTick * tick);
}

int Measure(const BenchOptions& options, pid_t server, int port) {
  Load load(absl::StrCat("127.0.0.1:", port), options.streams, options.connections);
  LoadCounts counts;
  if (!load.AwaitAllFlowing()) return 1;
  absl::SleepFor(absl::Seconds(options.warmup_s));
  load.TakeCounts(&counts);
  const absl::Time begin = absl::Now();
  const absl::Duration cpu_begin = ProcessorTime(server);
  absl::SleepFor(absl::Seconds(options.seconds));
  const double cpu = absl::ToDoubleSeconds(ProcessorTime(server) - cpu_begin);
  const double wall = absl::ToDoubleSeconds(absl::Now() - begin);
  if (!load.TakeCounts(&counts)) return 1;
  const nlohmann::ordered_json report = {
      {"streams", options.streams},
      {"connections", options.connections},
      {"output_threads", options.output_threads},
      {"period_ms", options.period_ms},
      {"seconds", wall},
      {"tokens", counts.tokens},
      {"tokens_per_second", counts.tokens / wall},
      {"server_cpu_seconds", cpu},
      {"tokens_per_cpu_second", counts.tokens / cpu},
      {"us_per_token", cpu / counts.tokens * 1e6},
      {"single_token_deltas", static_cast<double>(counts.single_token_deltas) / counts.deltas},
      {"added_latency_ms",
       {{"p50", LatencyMs(counts.latency_histogram, counts.tokens, 0.5)},
        {"p90", LatencyMs(counts.latency_histogram, counts.tokens, 0.9)},
        {"p99", LatencyMs(counts.latency_histogram, counts.tokens, 0.99)}}}};
  std::cout << report.dump(2) << std::endl;
  return 0;
}

// Starts this program again as the server, and is its client.
int Run(const BenchOptions& options, char** argv) {
  int to_server[2], from_server[2];
  if (pipe(to_server) != 0 || pipe(from_server) != 0) return 1;
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, to_server[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, from_server[1], STDOUT_FILENO);
  for (const int fd : {to_server[0], to_server[1], from_server[0], from_server[1]}) {
    posix_spawn_file_actions_addclose(&actions, fd);
  }
  std::vector<char*> arguments;
  for (char** argument = argv; *argument != nullptr; ++argument) arguments.push_back(*argument);
  std::string serve = "--serve";
  arguments.push_back(serve.data());
  arguments.push_back(nullptr);
  pid_t server = 0;
  if (posix_spawn(&server, "/proc/self/exe", &actions, nullptr, arguments.data(), environ) != 0) {
    std::perror("posix_spawn");
    return 1;
  }
  posix_spawn_file_actions_destroy(&actions);
  close(to_server[0]);
  close(from_server[1]);
  FILE* output = fdopen(from_server[0], "r");
  int port = 0;
  int result = 1;
  if (std::fscanf(output, "%d", &port) == 1) result = Measure(options, server, port);
  std::fclose(output);
  close(to_server[1]);
  waitpid(server, nullptr, 0);
  return result;
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  latentd::BenchOptions options;
  CLI::App app("What the serving path costs without a model.");
  app.add_option("--model", options.model, "folder of the tokenizer")->capture_default_str();
  app.add_option("--streams", options.streams)->capture_default_str();
  app.add_option("--connections", options.connections)->capture_default_str();
  app.add_option("--output-threads", options.output_threads)->capture_default_str();
  app.add_option("--period-ms", options.period_ms, "of a step; 0: unpaced")->capture_default_str();
  app.add_option("--warmup", options.warmup_s, "seconds")->capture_default_str();
  app.add_option("--seconds", options.seconds, "of measurement")->capture_default_str();
  app.add_flag("--serve", options.serve, "be the server process");
  CLI11_PARSE(app, argc, argv);
  return options.serve ? latentd::Serve(options) : latentd::Run(options, argv);
}
