#include "server/metrics.h"

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

RequestRecord Record(std::string_view method, absl::StatusCode code, std::string_view finish) {
  RequestRecord record;
  record.method = method;
  record.code = code;
  record.finish_reason = finish;
  record.total = absl::Milliseconds(300);
  return record;
}

StepReport Step(int32_t num_sequences, int32_t num_tokens, int32_t num_sampled) {
  StepReport report;
  report.num_sequences = num_sequences;
  report.num_tokens = num_tokens;
  report.num_sampled = num_sampled;
  report.execute = absl::Milliseconds(5);
  return report;
}

// A daemon in the middle of its life.
void Fill(Metrics* metrics) {
  metrics->SetState(ServerState::kServing);
  metrics->SetLoadProgress(10, 20);
  metrics->SetStartupPhase("weights", absl::Seconds(2));
  metrics->SetEngine({.num_blocks = 100, .max_model_len = 4096}, "cpu", true, [] {
    return CoreStats{.num_waiting = 3,
                     .num_running = 2,
                     .num_background_waiting = 6,
                     .num_background_running = 5,
                     .num_blocks = 100,
                     .num_free_blocks = 75,
                     .num_steps = 7,
                     .num_preemptions = 1,
                     .num_background_preemptions = 4,
                     .prompt_tokens = 50,
                     .cached_tokens = 20};
  });
  StepReport prefill = Step(2, 66, 2);
  prefill.num_background_tokens = 60;
  metrics->OnStep(prefill);
  // A GPU tells its times; that it waited while there were no requests is no matter.
  StepReport decode = Step(2, 2, 2);
  decode.device = {.idle_seconds = 0.00015, .busy_seconds = 0.0045};
  metrics->OnStep(decode);
  decode.device->idle_seconds = 60;
  decode.after_pause = true;
  metrics->OnStep(decode);
  metrics->OnFirstToken(absl::Milliseconds(15));
  metrics->OnTokens(absl::Milliseconds(3), 4);
  RequestRecord record = Record("StreamChat", absl::StatusCode::kOk, "stop");
  record.prompt_tokens = 30;
  record.completion_tokens = 5;
  record.queue = absl::Milliseconds(5);
  record.time_to_first_token = absl::Milliseconds(15);
  record.decode = absl::Milliseconds(40);
  metrics->OnFinished(record);
  metrics->OnFinished(Record("Chat", absl::StatusCode::kCancelled, ""));
  metrics->OnRejected("QUEUE_FULL");
  metrics->OnFinished(Record("Chat", absl::StatusCode::kResourceExhausted, ""));
}

TEST(MetricsTest, CountsWhatHappened) {
  Metrics metrics("demo");
  Fill(&metrics);
  const std::string text = metrics.Text();
  for (const char* line : {
           "latentd_state{model=\"demo\",state=\"serving\"} 1\n",
           "latentd_state{model=\"demo\",state=\"loading\"} 0\n",
           "latentd_ready{model=\"demo\"} 1\n",
           "latentd_requests_waiting{model=\"demo\"} 3\n",
           "latentd_requests_running{model=\"demo\"} 2\n",
           "latentd_background_waiting{model=\"demo\"} 6\n",
           "latentd_background_running{model=\"demo\"} 5\n",
           "latentd_background_tokens_total{model=\"demo\"} 60\n",
           "latentd_background_preemptions_total{model=\"demo\"} 4\n",
           "latentd_kv_cache_usage_ratio{model=\"demo\"} 0.25\n",
           "latentd_prompt_tokens_total{model=\"demo\"} 50\n",
           "latentd_prompt_tokens_cached_total{model=\"demo\"} 20\n",
           "latentd_generation_tokens_total{model=\"demo\"} 6\n",
           "latentd_preemptions_total{model=\"demo\"} 1\n",
           "latentd_client_cancelled_total{model=\"demo\"} 1\n",
           "latentd_load_bytes_loaded{model=\"demo\"} 10\n",
           "latentd_startup_seconds{model=\"demo\",phase=\"weights\"} 2\n",
           "latentd_admission_rejections_total{model=\"demo\",reason=\"QUEUE_FULL\"} 1\n",
           "latentd_requests_total{model=\"demo\",method=\"StreamChat\",grpc_code=\"OK\",finish_"
           "reason=\"stop\"} 1\n",
           "latentd_requests_total{model=\"demo\",method=\"Chat\",grpc_code=\"CANCELLED\",finish_"
           "reason=\"\"} 1\n",
           "latentd_requests_total{model=\"demo\",method=\"Chat\",grpc_code=\"RESOURCE_EXHAUSTED\","
           "finish_reason=\"\"} 1\n",
           "latentd_time_to_first_token_seconds_bucket{model=\"demo\",le=\"0.01\"} 0\n",
           "latentd_time_to_first_token_seconds_bucket{model=\"demo\",le=\"0.02\"} 1\n",
           "latentd_inter_token_latency_seconds_count{model=\"demo\"} 4\n",
           "latentd_time_per_output_token_seconds_sum{model=\"demo\"} 0.01\n",
           "latentd_prefill_seconds_sum{model=\"demo\"} 0.01\n",
           "latentd_step_seconds_count{model=\"demo\",kind=\"prefill\"} 1\n",
           "latentd_step_seconds_count{model=\"demo\",kind=\"decode\"} 2\n",
           "latentd_device_busy_seconds_count{model=\"demo\"} 2\n",
           "latentd_device_idle_seconds_sum{model=\"demo\"} 0.00015\n",
           "latentd_device_idle_seconds_count{model=\"demo\"} 1\n",
           "latentd_step_tokens_bucket{model=\"demo\",le=\"64\"} 2\n",
           "latentd_step_tokens_bucket{model=\"demo\",le=\"128\"} 3\n",
           "latentd_request_generation_tokens_sum{model=\"demo\"} 5\n",
           "block_size=\"64\"",
           "version=\"",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
}

TEST(MetricsTest, SeriesExistBeforeTheirFirstEvent) {
  const std::string text = Metrics("demo").Text();
  for (const char* line : {
           "method=\"StreamChat\",grpc_code=\"OK\",finish_reason=\"stop\"} 0\n",
           "method=\"Complete\",grpc_code=\"UNAVAILABLE\",finish_reason=\"\"} 0\n",
           "latentd_admission_rejections_total{model=\"demo\",reason=\"QUEUE_FULL\"} 0\n",
           "latentd_ready{model=\"demo\"} 0\n",
           "latentd_kv_cache_usage_ratio{model=\"demo\"} 0\n",
           "latentd_inter_token_latency_seconds_count{model=\"demo\"} 0\n",
       }) {
    EXPECT_THAT(text, HasSubstr(line));
  }
  EXPECT_THAT(text, Not(HasSubstr("latentd_cache_config_info")));  // not known yet
}

TEST(MetricsTest, NotReadyWhileStuck) {
  Metrics metrics("demo");
  metrics.SetState(ServerState::kServing);
  metrics.SetAlive(false);
  EXPECT_THAT(metrics.Text(), HasSubstr("latentd_ready{model=\"demo\"} 0\n"));
  EXPECT_THAT(metrics.Text(), HasSubstr("latentd_alive{model=\"demo\"} 0\n"));
}

TEST(HistogramTest, BoundsAreInclusiveAndCumulative) {
  const double bounds[] = {1, 2, 5};
  Histogram histogram(bounds);
  for (double value : {0.0, 1.0, 1.5, 5.0, 6.0}) histogram.Observe(value);
  histogram.Observe(2, 10);
  const auto collected = histogram.Collect();
  EXPECT_THAT(collected.cumulative, ::testing::ElementsAre(2, 13, 14, 15));
  EXPECT_DOUBLE_EQ(collected.sum, 33.5);
}

TEST(MetricsTest, ScrapesWhileThreadsCount) {
  Metrics metrics("demo");
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&metrics] {
      for (int n = 0; n < 1000; ++n) {
        metrics.OnStep(Step(1, 1, 1));
        metrics.OnTokens(absl::Milliseconds(1), 1);
        metrics.OnRejected(n % 2 == 0 ? "QUEUE_FULL" : "OTHER");
        metrics.OnFinished(Record("Chat", absl::StatusCode::kOk, "length"));
      }
    });
  }
  for (int i = 0; i < 20; ++i) EXPECT_FALSE(metrics.Text().empty());
  for (std::thread& thread : threads) thread.join();
  const std::string text = metrics.Text();
  EXPECT_THAT(text, HasSubstr("latentd_generation_tokens_total{model=\"demo\"} 4000\n"));
  EXPECT_THAT(text, HasSubstr("reason=\"OTHER\"} 2000\n"));
}

// Prometheus' own linter: names, types, help, units.
TEST(MetricsTest, PromtoolFindsNothingWrong) {
  if (std::system("command -v promtool > /dev/null 2>&1") != 0) {
    GTEST_SKIP() << "promtool is not installed (Debian: package prometheus)";
  }
  Metrics metrics("a \"model\" \\ with\nall");
  Fill(&metrics);
  const std::filesystem::path dir(::testing::TempDir());
  std::ofstream(dir / "metrics.txt") << metrics.Text();
  const std::string command = "promtool check metrics < " + (dir / "metrics.txt").string() + " > " +
                              (dir / "promtool.txt").string() + " 2>&1";
  const int code = std::system(command.c_str());
  std::ifstream output(dir / "promtool.txt");
  const std::string said((std::istreambuf_iterator<char>(output)),
                         std::istreambuf_iterator<char>());
  EXPECT_EQ(code, 0) << said;
  EXPECT_EQ(said, "");
}

}  // namespace
}  // namespace latentd
