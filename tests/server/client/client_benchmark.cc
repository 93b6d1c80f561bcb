// How many deltas `latentd bench serve` itself can take: the load generator against a server, in a
// process of its own, that computes nothing and sends ready-made bytes. What a benchmark of the
// real daemon shows is the daemon's as long as it stays well below these figures.
//
// "step" rows send one delta to every stream each so many milliseconds, as a decoding server does;
// step 0 sends as fast as the streams take them. deltas_per_cpu_s is of the client's CPU alone.

#include <benchmark/benchmark.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/grpcpp.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <mutex>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>
#include <vector>

#include "engine/status.h"
#include "server/client/bench.h"
#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

constexpr int kDeltasPerStream = 128;

grpc::ByteBuffer Serialize(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

// Sends the same deltas to every call, and a model to who asks for one.
class DeltaServer final : public grpc::CallbackGenericService {
 public:
  explicit DeltaServer(int step_ms) : step_ms_(step_ms) {
    v1::GetModelResponse model;
    model.mutable_model()->set_name("deltas");
    model.mutable_model()->set_vocab_size(129280);
    model.mutable_model()->set_max_model_len(4096);
    model_ = Serialize(model);
    ticker_ = std::thread([this] { Tick(); });
  }

 private:
  class Call : public grpc::ServerGenericBidiReactor {
   public:
    Call(DeltaServer& server, bool is_stream) : server_(server), is_stream_(is_stream) {
      StartRead(&request_);
    }

    // One more delta may go; called by the ticker.
    void Allow() {
      const std::lock_guard lock(mutex_);
      ++allowed_;
      WriteNext();
    }

   private:
    void OnReadDone(bool ok) override {
      if (!ok) return Finish({grpc::StatusCode::INTERNAL, "no request"});
      if (!is_stream_) return StartWriteAndFinish(&server_.model_, {}, grpc::Status::OK);
      if (server_.step_ms_ > 0) return server_.Add(this);
      const std::lock_guard lock(mutex_);
      allowed_ = kDeltasPerStream;
      WriteNext();
    }
    void OnWriteDone(bool ok) override {
      const std::lock_guard lock(mutex_);
      writing_ = false;
      broken_ |= !ok;
      WriteNext();
    }
    void OnDone() override {
      server_.Remove(this);
      delete this;
    }
    void WriteNext() {
      if (writing_ || finished_) return;
      if (broken_) {
        finished_ = true;
        return Finish({grpc::StatusCode::CANCELLED, "the client is gone"});
      }
      if (written_ == std::min(allowed_, kDeltasPerStream) && written_ < kDeltasPerStream) return;
      writing_ = true;
      const int i = written_++;
      if (i < kDeltasPerStream) return StartWrite(&server_.delta_);
      if (i == kDeltasPerStream) return StartWrite(&server_.finish_);
      finished_ = true;
      StartWriteAndFinish(&server_.usage_, {}, grpc::Status::OK);
    }

    DeltaServer& server_;
    const bool is_stream_;
    grpc::ByteBuffer request_;
    std::mutex mutex_;
    int allowed_ = 0, written_ = 0;
    bool writing_ = false, broken_ = false, finished_ = false;
  };

  grpc::ServerGenericBidiReactor* CreateReactor(
      grpc::GenericCallbackServerContext* context) override {
    return new Call(*this, !context->method().ends_with("/GetModel"));
  }
  void Add(Call* call) {
    const std::lock_guard lock(mutex_);
    calls_.push_back(call);
  }
  void Remove(Call* call) {
    const std::lock_guard lock(mutex_);
    std::erase(calls_, call);
  }
  void Tick() {
    auto next = std::chrono::steady_clock::now();
    while (step_ms_ > 0) {
      next += std::chrono::milliseconds(step_ms_);
      std::this_thread::sleep_until(next);
      const std::lock_guard lock(mutex_);
      for (Call* call : calls_) call->Allow();
    }
  }

  const int step_ms_;
  grpc::ByteBuffer model_;
  grpc::ByteBuffer delta_ = Serialize(ContentEvent(" token"));
  grpc::ByteBuffer finish_ = Serialize(FinishedEvent());
  grpc::ByteBuffer usage_ = Serialize(UsageEvent(16, 0, kDeltasPerStream));
  std::mutex mutex_;
  std::vector<Call*> calls_;
  std::thread ticker_;  // the process's end ends it
};

// Starts the server in a child, before this process touches gRPC: gRPC does not survive a fork.
class ServerProcess {
 public:
  explicit ServerProcess(int step_ms) {
    int fds[2];
    LATENTD_CHECK(pipe(fds) == 0);
    pid_ = fork();
    LATENTD_CHECK(pid_ >= 0);
    if (pid_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      DeltaServer service(step_ms);
      int port = 0;
      grpc::ServerBuilder builder;
      builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
      builder.RegisterCallbackGenericService(&service);
      const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
      LATENTD_CHECK(server != nullptr && write(fds[1], &port, sizeof(port)) == sizeof(port));
      while (true) pause();
    }
    LATENTD_CHECK(read(fds[0], &port_, sizeof(port_)) == sizeof(port_));
    close(fds[0]);
    close(fds[1]);
  }
  ~ServerProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }

 private:
  pid_t pid_;
  int port_ = 0;
};

void TakeDeltas(benchmark::State& state, const std::string& target) {
  BenchOptions options = {.connection = {.target = target},
                          .concurrency = state.range(0),
                          .num_requests = 4 * state.range(0),
                          .prompt_tokens = "16",
                          .output_tokens = std::to_string(kDeltasPerStream),
                          .quiet = true};
  nlohmann::json report;
  for (auto _ : state) {
    std::ostringstream out, err;
    const int exit_code = RunBench(options, /*err_is_terminal=*/false, out, err);
    if (!out.str().empty()) report = nlohmann::json::parse(out.str());
    if (exit_code != kExitOk) {
      state.SkipWithError((err.str() + report["errors"].dump()).c_str());
      return;
    }
  }
  const double num_deltas = report["deltas"]["count"];
  state.counters["deltas_per_s"] = num_deltas / report["duration_s"].get<double>();
  state.counters["deltas_per_cpu_s"] = report["client"]["deltas_per_cpu_s"];
  state.counters["itl_p50_ms"] = report["latency_ms"]["itl"]["p50"];
  state.counters["itl_p99_ms"] = report["latency_ms"]["itl"]["p99"];
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  const latentd::ServerProcess fast(/*step_ms=*/0), stepping(/*step_ms=*/50);
  const auto add = [](const char* name, const latentd::ServerProcess& server, int streams) {
    benchmark::RegisterBenchmark(name, latentd::TakeDeltas, server.target())
        ->Arg(streams)
        ->Iterations(1)
        ->Unit(benchmark::kMillisecond)
        ->UseRealTime();
  };
  for (const int streams : {1, 64, 2048}) add("step_0_ms", fast, streams);
  for (const int streams : {64, 2048}) add("step_50_ms", stepping, streams);
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
}
