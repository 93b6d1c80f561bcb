#include "server/client/bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

using nlohmann::json;
using testing::HasSubstr;
using testing::IsEmpty;

void Sleep(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Answers each request with as many tokens as it asks for: the first after `ttft_ms`, the others
// `itl_ms` apart, `tokens_per_delta` in each delta.
struct Timing {
  int ttft_ms = 0;
  int itl_ms = 0;
  int tokens_per_delta = 1;
};
ScriptedServer::Stream<v1::CompleteRequest> Answer(Timing timing) {
  return [timing](grpc::ServerContext&, const v1::CompleteRequest& request,
                  ScriptedServer::Writer& writer) {
    writer.Write(StartedEvent());
    const int total = request.limits().max_tokens();
    for (int sent = 0; sent < total;) {
      Sleep(sent == 0 ? timing.ttft_ms : timing.itl_ms);
      const int num = std::min(timing.tokens_per_delta, total - sent);
      writer.Write(ContentEvent("x", num));
      sent += num;
    }
    writer.Write(FinishedEvent(v1::FINISH_REASON_LENGTH));
    writer.Write(UsageEvent(request.tokens().ids_size(), 2, total, 1));
    return grpc::Status::OK;
  };
}

class BenchTest : public testing::Test {
 protected:
  BenchTest() {
    server_.on_stream_complete = Answer({});
    options_.connection.target = server_.target();
    options_.quiet = true;
    options_.num_requests = 20;
    options_.concurrency = 4;
    options_.prompt_tokens = "5";
    options_.output_tokens = "8";
  }
  int Run() { return RunBench(options_, /*err_is_terminal=*/false, out_, err_); }
  json Report() const { return json::parse(out_.str()); }

  ScriptedServer server_;
  BenchOptions options_;
  std::ostringstream out_, err_;
};

TEST_F(BenchTest, MeasuresKnownLatencies) {
  server_.on_stream_complete = Answer({.ttft_ms = 60, .itl_ms = 20});
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  const json report = Report();
  const json& latency = report["latency_ms"];
  EXPECT_EQ(latency["ttft"]["count"], 20);
  EXPECT_GE(latency["ttft"]["min"], 60);
  EXPECT_LT(latency["ttft"]["p50"], 120);
  EXPECT_EQ(latency["itl"]["count"], 20 * 7);
  EXPECT_GE(latency["itl"]["p50"], 19);
  EXPECT_LT(latency["itl"]["p50"], 40);
  EXPECT_EQ(latency["tpot"]["count"], 20);
  EXPECT_GE(latency["tpot"]["p50"], 19);
  EXPECT_LT(latency["tpot"]["p50"], 40);
  EXPECT_GE(latency["e2e"]["min"], 60 + 7 * 20);
  EXPECT_LT(latency["e2e"]["p50"], 400);
  // Five rounds of four at once. Upper limits leave room for a busy machine.
  EXPECT_GE(report["duration_s"], 5 * 0.2);
  EXPECT_LT(report["duration_s"], 5 * 0.5);
  EXPECT_EQ(report["requests"]["max_in_flight"], 4);
  EXPECT_EQ(report["tokens"], json::parse(R"({"prompt": 100, "cached": 40, "completion": 160,
                                              "reasoning": 20})"));
  EXPECT_NEAR(report["throughput"]["completion_tokens_per_s"].get<double>() *
                  report["duration_s"].get<double>(),
              160, 1e-6);
  EXPECT_EQ(report["deltas"], json::parse(R"({"count": 160, "tokens_per_delta": 1.0,
                                              "single_token_share": 1.0})"));
  EXPECT_THAT(err_.str(), IsEmpty());
}

TEST_F(BenchTest, CountsTokensOfJoinedDeltas) {
  server_.on_stream_complete = Answer({.tokens_per_delta = 3});  // 3 + 3 + 2
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_EQ(Report()["deltas"]["count"], 60);
  EXPECT_NEAR(Report()["deltas"]["tokens_per_delta"], 8.0 / 3, 1e-9);
  EXPECT_EQ(Report()["deltas"]["single_token_share"], 0);
}

TEST_F(BenchTest, OpenLoopMeasuresFromWhenARequestWasDue) {
  // The server serves one at a time, 50 ms each, and a request is due every 20 ms: the tenth is
  // answered at 500 ms, 320 ms after it was due.
  options_.concurrency = 0;
  options_.request_rate = 50;
  options_.arrivals = "constant";
  options_.num_requests = 10;
  options_.output_tokens = "1";
  std::mutex one_at_a_time;
  server_.on_stream_complete = [&](auto& context, const auto& request, auto& writer) {
    const std::lock_guard lock(one_at_a_time);
    return Answer({.ttft_ms = 50})(context, request, writer);
  };
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  const json report = Report();
  EXPECT_GE(report["latency_ms"]["ttft"]["max"], 310);
  EXPECT_LT(report["latency_ms"]["ttft"]["max"], 600);
  EXPECT_GE(report["latency_ms"]["ttft"]["min"], 50);
  EXPECT_LT(report["latency_ms"]["ttft"]["min"], 100);
  EXPECT_GE(report["duration_s"], 0.5);
  EXPECT_LT(report["latency_ms"]["send_lag"]["p50"], 15);
  EXPECT_GE(report["requests"]["max_in_flight"], 5);
}

TEST_F(BenchTest, DurationEndsSendingNotAnswers) {
  server_.on_stream_complete = Answer({.ttft_ms = 50});
  options_.num_requests = 0;
  options_.duration_s = 0.3;
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  const json report = Report();
  EXPECT_GE(report["requests"]["completed"], 4 * 2);
  EXPECT_LE(report["requests"]["completed"], 4 * 7);
  EXPECT_EQ(report["requests"]["sent"], report["requests"]["completed"]);
  EXPECT_GE(report["duration_s"], 0.3);
}

TEST_F(BenchTest, WarmupIsNotMeasured) {
  options_.warmup = 7;
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_EQ(Report()["requests"]["sent"], 20);
  EXPECT_EQ(server_.completions().size(), 27u);
}

TEST_F(BenchTest, SendsTheSameRequestsWhateverThreadsAndConnections) {
  const auto prompts = [this] {
    std::multiset<std::string> prompts;
    for (const v1::CompleteRequest& request : server_.completions()) {
      prompts.insert(request.tokens().SerializeAsString());
    }
    return prompts;
  };
  ASSERT_EQ(Run(), kExitOk);
  const auto before = prompts();
  options_.threads = 3;
  options_.connections = 5;
  ASSERT_EQ(Run(), kExitOk);
  auto twice = before;
  twice.insert(before.begin(), before.end());
  EXPECT_EQ(prompts(), twice);
}

TEST_F(BenchTest, Unary) {
  options_.unary = true;
  server_.on_complete = [](auto&, const v1::CompleteRequest& request, auto* response) {
    Sleep(20);
    *response->mutable_usage() =
        UsageEvent(request.tokens().ids_size(), 0, request.limits().max_tokens()).usage();
    return grpc::Status::OK;
  };
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  const json report = Report();
  EXPECT_EQ(report["requests"]["completed"], 20);
  EXPECT_EQ(report["tokens"]["completion"], 160);
  EXPECT_EQ(report["latency_ms"]["ttft"]["count"], 0);
  EXPECT_GE(report["latency_ms"]["e2e"]["min"], 20);
  EXPECT_TRUE(report["deltas"]["single_token_share"].is_null());
}

TEST_F(BenchTest, ChatsOfAFile) {
  const std::string path = testing::TempDir() + "/bench_prompts.txt";
  std::ofstream(path) << "one\ntwo\n";
  options_.prompts = path;
  options_.output_tokens = "";
  server_.on_stream_chat = [](auto&, const auto&, auto& writer) {
    writer.Write(ReasoningEvent("hm"));
    writer.Write(ContentEvent("hi"));
    writer.Write(FinishedEvent());
    writer.Write(UsageEvent(4, 0, 3, 1));
    return grpc::Status::OK;
  };
  ASSERT_EQ(Run(), kExitOk) << err_.str();
  EXPECT_EQ(Report()["deltas"]["count"], 40);
  EXPECT_EQ(server_.chats().size(), 20u);
  std::filesystem::remove(path);
}

TEST_F(BenchTest, CountsErrorsByCode) {
  std::atomic<int> calls = 0;
  server_.on_stream_complete = [&](auto& context, const auto& request, auto& writer) {
    switch (calls++ % 5) {
      case 0:
        return grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "queue is full");
      case 1:
        writer.Write(ContentEvent("half"));
        return grpc::Status::OK;
      default:
        return Answer({})(context, request, writer);
    }
  };
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_EQ(err_.str(), "error: 40.00 % of the requests failed; --max-error-rate allows 0.00 %\n");
  const json report = Report();
  EXPECT_EQ(report["requests"]["completed"], 12);
  EXPECT_EQ(report["requests"]["failed"], 8);
  EXPECT_EQ(report["errors"]["RESOURCE_EXHAUSTED"],
            json::parse(R"({"count": 4, "message": "RESOURCE_EXHAUSTED: queue is full"})"));
  EXPECT_EQ(report["errors"]["INCOMPLETE_STREAM"]["count"], 4);
  EXPECT_EQ(report["latency_ms"]["e2e"]["count"], 12);

  options_.max_error_rate = 0.4;
  out_.str("");
  EXPECT_EQ(Run(), kExitOk);
}

TEST_F(BenchTest, TimeoutIsAnError) {
  server_.on_stream_complete = Answer({.ttft_ms = 500});
  options_.timeout_s = 0.05;
  options_.num_requests = 2;
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_EQ(Report()["errors"]["DEADLINE_EXCEEDED"]["count"], 2);
}

TEST_F(BenchTest, ShortAnswersAreTold) {
  server_.on_stream_complete = [](auto&, const auto&, auto& writer) {
    writer.Write(ContentEvent("x"));
    writer.Write(FinishedEvent());
    writer.Write(UsageEvent(5, 0, 7));
    return grpc::Status::OK;
  };
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_EQ(Report()["requests"]["short"], 20);
}

TEST_F(BenchTest, CtrlCEndsItWithTheReportSoFar) {
  server_.on_stream_complete = [](auto& context, const auto& request, auto& writer) {
    if (request.tokens().ids(0) % 2 == 0) return Answer({})(context, request, writer);
    while (!context.IsCancelled()) Sleep(5);
    return grpc::Status::CANCELLED;
  };
  std::thread ctrl_c([] {
    Sleep(500);
    kill(getpid(), SIGINT);
  });
  options_.num_requests = 1000;
  EXPECT_EQ(Run(), kExitInterrupted);
  ctrl_c.join();
  const json report = Report();
  EXPECT_TRUE(report["interrupted"]);
  EXPECT_EQ(report["requests"]["cancelled"], 4);
  EXPECT_EQ(report["requests"]["failed"], 0);
  EXPECT_LT(report["duration_s"], 3);
}

TEST_F(BenchTest, WaitsForALoadingServer) {
  std::atomic<int> calls = 0;
  server_.on_get_model = [&] { return ++calls < 3 ? LoadingStatus(100) : grpc::Status::OK; };
  EXPECT_EQ(Run(), kExitOk);
  EXPECT_THAT(err_.str(), HasSubstr("the model is loading"));
}

TEST_F(BenchTest, RefusesBeforeItSends) {
  options_.prompt_tokens = "4090";
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_THAT(err_.str(), HasSubstr("need up to 4098 tokens; the model's max_model_len is 4096"));
  err_.str("");
  options_.concurrency = -3;
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_EQ(err_.str(), "error: --concurrency is -3; it must lie in [1, 65536]\n");
  err_.str("");
  options_.concurrency = 1;
  options_.output = "/nonexistent/report.json";
  EXPECT_EQ(Run(), kExitUsage);
  EXPECT_EQ(err_.str(), "error: --output: cannot write /nonexistent/report.json\n");
  EXPECT_THAT(server_.completions(), IsEmpty());
  EXPECT_THAT(out_.str(), IsEmpty());
}

TEST_F(BenchTest, NobodyThere) {
  options_.connection.target = "127.0.0.1:1";
  EXPECT_EQ(Run(), kExitFailed);
  EXPECT_THAT(err_.str(), HasSubstr("error: UNAVAILABLE"));
}

TEST_F(BenchTest, CommandLineWritesReportAndTable) {
  const std::string path = testing::TempDir() + "/bench_report.json";
  CLI::App app;
  int exit_code = -1;
  RegisterBenchCommand(app, &exit_code);
  testing::internal::CaptureStderr();
  app.parse("bench serve --target " + server_.target() +
            " --concurrency 2 --num-requests 6 --prompt-tokens 3 --output-tokens 4 --output " +
            path);
  const std::string table = testing::internal::GetCapturedStderr();
  EXPECT_EQ(exit_code, kExitOk);
  EXPECT_THAT(table, HasSubstr("6 completed"));
  std::ifstream file(path);
  const json report = json::parse(file);
  EXPECT_EQ(report["tokens"]["completion"], 24);
  EXPECT_EQ(report["config"]["output_tokens"], "4");
  std::filesystem::remove(path);
  EXPECT_THROW(app.parse("bench"), CLI::ParseError);  // serve is missing
}

}  // namespace
}  // namespace latentd
