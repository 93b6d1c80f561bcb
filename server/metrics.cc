#include "server/metrics.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <optional>
#include <utility>

#include "absl/time/clock.h"
#include "fmt/format.h"
#include "server/version.h"

namespace latentd {
namespace {

using Labels = MetricLabels;

// Series that exist from the start, so that a rate over them sees the first increment.
constexpr absl::StatusCode kExpectedCodes[] = {
    absl::StatusCode::kCancelled,         absl::StatusCode::kInvalidArgument,
    absl::StatusCode::kDeadlineExceeded,  absl::StatusCode::kNotFound,
    absl::StatusCode::kResourceExhausted, absl::StatusCode::kUnimplemented,
    absl::StatusCode::kInternal,          absl::StatusCode::kUnavailable};
constexpr std::string_view kExpectedRejections[] = {"QUEUE_FULL", "LOADING", "DRAINING"};

// Seconds. A token takes a quarter of a millisecond on the demo model, 10 to 60 on DeepSeek-V3.
constexpr double kTokenSeconds[] = {.00025, .0005, .001, .002, .004, .006, .008, .01, .015,
                                    .02,    .025,  .03,  .035, .04,  .06,  .08,  .1,  .2,
                                    .4,     .6,    .8,   1,    2,    4,    6,    8};
constexpr double kFirstTokenSeconds[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                         1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
constexpr double kRequestSeconds[] = {.01,  .02,   .04,   .08,   .16,   .32, .64, 1.28, 2.56,
                                      5.12, 10.24, 20.48, 40.96, 81.92, 160, 320, 640,  1280};
constexpr double kSchedulerSeconds[] = {.00001, .00002, .00005, .0001, .0002,
                                        .0005,  .001,   .002,   .005,  .01};
constexpr double kStepTokens[] = {1,   2,   4,    8,    16,   32,   64,   128,
                                  256, 512, 1024, 2048, 4096, 8192, 16384};
constexpr double kStepSequences[] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};
constexpr double kRequestTokens[] = {1,    2,    5,    10,    20,    50,    100,    200,   500,
                                     1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};

template <size_t N>
int IndexOf(const std::array<std::string_view, N>& names, std::string_view name) {
  const auto found = std::find(names.begin(), names.end(), name);
  return found == names.end() ? -1 : static_cast<int>(found - names.begin());
}

// The names and meanings that every Prometheus client library gives to these.
void CollectProcess(absl::Time start, MetricsWriter* out) {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) { return time.tv_sec + time.tv_usec * 1e-6; };
  out->Counter("process_cpu_seconds_total", "User and system CPU time spent, in seconds.",
               seconds(usage.ru_utime) + seconds(usage.ru_stime));
  int64_t pages = 0;
  int64_t resident_pages = 0;
  std::ifstream("/proc/self/statm") >> pages >> resident_pages;
  out->Gauge("process_resident_memory_bytes", "Resident memory, in bytes.",
             static_cast<double>(resident_pages * sysconf(_SC_PAGESIZE)));
  out->Gauge("process_start_time_seconds", "Start of the process, in seconds since the Unix epoch.",
             absl::ToDoubleSeconds(start - absl::UnixEpoch()));
}

void CollectCluster(const ClusterStats& stats, MetricsWriter* out) {
  out->Gauge("latentd_group_epoch", "Which forming of the group of ranks the latest one is.",
             stats.epoch);
  out->Gauge("latentd_group_formed", "1 while the group is whole.", stats.formed);
  out->Counter("latentd_group_formings_total", "Formings of the group that succeeded.",
               stats.num_formed);
  out->Counter("latentd_group_steps_total", "Steps that all ranks computed.", stats.num_steps);
  out->Gauge("latentd_group_recovery_seconds",
             "How long the group was missing, the latest time that it was formed again.",
             stats.last_forming_seconds);
  out->Family("latentd_group_transport_info",
              "Constant 1; the label says what carries the ranks' tensors.", "gauge")
      .Value(1, {{"transport", stats.transport}});
  out->Family("latentd_ranks_lost_total", "Ranks that were lost, by reason.", "counter");
  for (size_t i = 0; i < kNumLossReasons; ++i) {
    if (!IsLossOfRank(static_cast<LossReason>(i))) continue;
    out->Value(stats.ranks_lost[i], {{"reason", std::string(kLossReasonNames[i])}});
  }
  out->Family(
      "latentd_group_given_up_total",
      "Groups that were given up, by the first reason; step_deadline: a step took too long.",
      "counter");
  for (size_t i = 0; i < kNumLossReasons; ++i) {
    out->Value(stats.groups_given_up[i], {{"reason", std::string(kLossReasonNames[i])}});
  }
  out->Family("latentd_rank_state", "1 for the state that a rank is in, 0 for the others.",
              "gauge");
  for (size_t rank = 0; rank < stats.ranks.size(); ++rank) {
    for (size_t i = 0; i < kRankStateNames.size(); ++i) {
      out->Value(static_cast<size_t>(stats.ranks[rank].state) == i,
                 {{"rank", std::to_string(rank)},
                  {"node", std::to_string(stats.ranks[rank].node)},
                  {"state", std::string(kRankStateNames[i])}});
    }
  }
}

}  // namespace

Metrics::Metrics(std::string model)
    : model_(std::move(model)),
      start_(absl::Now()),
      time_to_first_token_(kFirstTokenSeconds),
      inter_token_latency_(kTokenSeconds),
      time_per_output_token_(kTokenSeconds),
      request_duration_(kRequestSeconds),
      queue_(kFirstTokenSeconds),
      prefill_(kFirstTokenSeconds),
      decode_step_(kTokenSeconds),
      prefill_step_(kTokenSeconds),
      device_busy_(kTokenSeconds),
      device_idle_(kSchedulerSeconds),
      scheduler_(kSchedulerSeconds),
      step_tokens_(kStepTokens),
      step_sequences_(kStepSequences),
      request_prompt_tokens_(kRequestTokens),
      request_generation_tokens_(kRequestTokens) {
  for (std::string_view reason : kExpectedRejections) rejections_[std::string(reason)] = 0;
}

void Metrics::SetLoadProgress(uint64_t loaded_bytes, uint64_t total_bytes) {
  load_bytes_loaded_ = loaded_bytes;
  load_bytes_total_ = total_bytes;
}

void Metrics::SetStartupPhase(std::string_view phase, absl::Duration duration) {
  absl::MutexLock lock(&mutex_);
  startup_seconds_[std::string(phase)] = absl::ToDoubleSeconds(duration);
}

void Metrics::SetEngine(const EngineInfo& info, std::string engine, bool prefix_caching,
                        std::function<CoreStats()> stats) {
  absl::MutexLock lock(&mutex_);
  engine_labels_ = {{"engine", std::move(engine)},
                    {"block_size", std::to_string(kBlockSize)},
                    {"num_blocks", std::to_string(info.num_blocks)},
                    {"num_dp_ranks", std::to_string(info.num_dp_ranks)},
                    {"max_model_len", std::to_string(info.max_model_len)},
                    {"prefix_caching", prefix_caching ? "true" : "false"}};
  core_stats_ = std::move(stats);
}

void Metrics::SetCluster(std::function<ClusterStats()> stats) {
  absl::MutexLock lock(&mutex_);
  cluster_stats_ = std::move(stats);
}

void Metrics::SetBatch(std::function<void(MetricsWriter*)> write) {
  absl::MutexLock lock(&mutex_);
  write_batch_ = std::move(write);
}

void Metrics::OnStep(const StepReport& report) {
  const bool decode = report.num_tokens == report.num_sequences;
  (decode ? decode_step_ : prefill_step_).Observe(absl::ToDoubleSeconds(report.execute));
  if (report.device) {
    device_busy_.Observe(report.device->busy_seconds);
    if (!report.after_pause) device_idle_.Observe(report.device->idle_seconds);
  }
  scheduler_.Observe(absl::ToDoubleSeconds(report.schedule + report.update));
  step_tokens_.Observe(report.num_tokens);
  step_sequences_.Observe(report.num_sequences);
  generation_tokens_.fetch_add(report.num_sampled, std::memory_order_relaxed);
  background_tokens_.fetch_add(report.num_background_tokens, std::memory_order_relaxed);
}

void Metrics::OnFinished(const RequestRecord& record) {
  const int method = IndexOf(kMethods, record.method);
  const int code = static_cast<int>(record.code);
  const int finish = std::max(0, IndexOf(kFinishReasons, record.finish_reason));
  if (method >= 0 && code >= 0 && code < kNumCodes) {
    requests_[method][code][finish].fetch_add(1, std::memory_order_relaxed);
  }
  if (record.code == absl::StatusCode::kCancelled) ++client_cancelled_;
  request_duration_.Observe(absl::ToDoubleSeconds(record.total));
  if (record.queue) queue_.Observe(absl::ToDoubleSeconds(*record.queue));
  if (record.queue && record.time_to_first_token) {
    prefill_.Observe(absl::ToDoubleSeconds(*record.time_to_first_token - *record.queue));
  }
  if (record.decode && record.completion_tokens > 1) {
    time_per_output_token_.Observe(absl::ToDoubleSeconds(*record.decode) /
                                   (record.completion_tokens - 1));
  }
  if (record.prompt_tokens > 0) request_prompt_tokens_.Observe(record.prompt_tokens);
  if (record.completion_tokens > 0) request_generation_tokens_.Observe(record.completion_tokens);
}

void Metrics::OnRejected(std::string_view reason) {
  absl::MutexLock lock(&mutex_);
  ++rejections_[std::string(reason)];
}

void Metrics::OnFirstToken(absl::Duration since_arrival) {
  time_to_first_token_.Observe(absl::ToDoubleSeconds(since_arrival));
}

void Metrics::OnTokens(absl::Duration since_last, int64_t count) {
  inter_token_latency_.Observe(absl::ToDoubleSeconds(since_last), count);
}

std::string Metrics::Text() const {
  MetricsWriter out(model_);
  const ServerState state = state_;

  out.Family("latentd_build_info", "Constant 1; the labels say what is running.", "gauge")
      .Value(1, {{"version", kVersion}});
  out.Family("latentd_state", "1 for the state that the daemon is in, 0 for the others.", "gauge");
  for (size_t i = 0; i < kServerStateNames.size(); ++i) {
    out.Value(static_cast<size_t>(state) == i, {{"state", std::string(kServerStateNames[i])}});
  }
  out.Gauge("latentd_ready", "1 when calls are answered (health key \"\").",
            state == ServerState::kServing && alive_ && engine_ready_);
  out.Gauge("latentd_alive", "1 when the process makes progress (health key \"liveness\").",
            alive_);
  out.Gauge("latentd_load_bytes_loaded", "Bytes of weights loaded so far.", load_bytes_loaded_);
  out.Gauge("latentd_load_bytes_expected", "Bytes of weights to load.", load_bytes_total_);

  CoreStats core;
  std::optional<ClusterStats> cluster;
  {
    absl::MutexLock lock(&mutex_);
    out.Family("latentd_startup_seconds", "How long each phase of the start took.", "gauge");
    for (const auto& [phase, seconds] : startup_seconds_) out.Value(seconds, {{"phase", phase}});
    if (core_stats_) {
      Labels labels;
      for (const auto& [name, value] : engine_labels_) labels.emplace_back(name, value);
      out.Family("latentd_cache_config_info",
                 "Constant 1; the labels describe engine and KV cache.", "gauge")
          .Value(1, labels);
      core = core_stats_();
    }
    if (cluster_stats_) cluster = cluster_stats_();
  }
  out.Gauge("latentd_requests_waiting", "Requests that wait for a place in a step.",
            core.num_waiting);
  out.Gauge("latentd_requests_running", "Sequences that take part in steps.", core.num_running);
  out.Gauge("latentd_background_waiting",
            "Background requests (items of batch jobs) that wait for a place in a step.",
            core.num_background_waiting);
  out.Gauge("latentd_background_running", "Background sequences that take part in steps.",
            core.num_background_running);
  out.Counter("latentd_background_tokens_total",
              "Of the tokens of steps (latentd_step_tokens_sum): for background requests.",
              background_tokens_);
  out.Counter("latentd_background_preemptions_total",
              "Background sequences that gave up their places or blocks, mostly for others.",
              core.num_background_preemptions);
  out.Gauge("latentd_kv_cache_blocks", "Blocks of the KV cache.", core.num_blocks);
  out.Gauge(
      "latentd_kv_cache_usage_ratio",
      "Share of the KV cache's blocks that running sequences hold, 0 to 1.",
      core.num_blocks == 0 ? 0 : 1 - static_cast<double>(core.num_free_blocks) / core.num_blocks);
  out.Counter("latentd_steps_total", "Steps of the engine.", core.num_steps);
  out.Counter("latentd_preemptions_total",
              "Running sequences that gave up their blocks and are computed again; background ones "
              "aside.",
              core.num_preemptions);
  out.Counter("latentd_prompt_tokens_total", "Prompt tokens of admitted requests.",
              core.prompt_tokens);
  out.Counter("latentd_prompt_tokens_cached_total",
              "Of the prompt tokens: found in the prefix cache.", core.cached_tokens);
  out.Counter("latentd_generation_tokens_total", "Tokens drawn.", generation_tokens_);
  out.Counter("latentd_recoveries_total",
              "Steps that the engine lost, such as by the loss of a rank; their sequences are "
              "computed again.",
              core.num_recoveries);
  out.Counter("latentd_sequences_recovered_total", "Sequences that were computed again for that.",
              core.num_recovered);
  out.Counter("latentd_requests_unrecovered_total",
              "Requests that max_recoveries or recovery_timeout ended.", core.num_unrecovered);
  out.Counter("latentd_engine_not_ready_seconds_total",
              "Time that the engine was there and not ready: a rank was missing.",
              absl::ToDoubleSeconds(core.not_ready));
  if (cluster) CollectCluster(*cluster, &out);

  out.Family("latentd_requests_total", "Generating calls that ended, by method, code and finish.",
             "counter");
  for (size_t method = 0; method < kMethods.size(); ++method) {
    for (int code = 0; code < kNumCodes; ++code) {
      for (size_t finish = 0; finish < kFinishReasons.size(); ++finish) {
        const int64_t count = requests_[method][code][finish].load(std::memory_order_relaxed);
        const bool expected =
            code == 0
                ? kFinishReasons[finish] == "stop" || kFinishReasons[finish] == "length"
                : finish == 0 &&
                      std::find(std::begin(kExpectedCodes), std::end(kExpectedCodes),
                                static_cast<absl::StatusCode>(code)) != std::end(kExpectedCodes);
        if (count == 0 && !expected) continue;
        out.Value(static_cast<double>(count),
                  {{"method", std::string(kMethods[method])},
                   {"grpc_code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))},
                   {"finish_reason", std::string(kFinishReasons[finish])}});
      }
    }
  }
  out.Family("latentd_admission_rejections_total", "Calls refused at the door, by reason.",
             "counter");
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [reason, count] : rejections_) {
      out.Value(static_cast<double>(count), {{"reason", reason}});
    }
    if (write_batch_) write_batch_(&out);
  }
  out.Counter("latentd_client_cancelled_total", "Calls whose client went away or cancelled.",
              client_cancelled_);

  out.Distribution("latentd_time_to_first_token_seconds",
                   "From a call's arrival to its first token.", time_to_first_token_);
  out.Distribution("latentd_inter_token_latency_seconds",
                   "Between two tokens of one sequence, every pair.", inter_token_latency_);
  out.Distribution("latentd_time_per_output_token_seconds",
                   "Mean time between the tokens of one request.", time_per_output_token_);
  out.Distribution("latentd_request_duration_seconds", "From a call's arrival to its end.",
                   request_duration_);
  out.Distribution("latentd_queue_seconds", "From a call's arrival to its first step.", queue_);
  out.Distribution("latentd_prefill_seconds", "From a request's first step to its first token.",
                   prefill_);
  out.Family("latentd_step_seconds",
             "One step of the engine: decode computes one token of each sequence, prefill more.",
             "histogram")
      .Buckets(decode_step_, {{"kind", "decode"}})
      .Buckets(prefill_step_, {{"kind", "prefill"}});
  out.Distribution("latentd_device_busy_seconds",
                   "Of a step, what the GPU needed for it. Empty for the CPU engine.",
                   device_busy_);
  out.Distribution("latentd_device_idle_seconds",
                   "Between two steps, how long the GPU waited; pauses without requests aside.",
                   device_idle_);
  out.Distribution("latentd_scheduler_seconds", "Planning and booking of one step.", scheduler_);
  out.Distribution("latentd_step_tokens", "Tokens computed in one step.", step_tokens_);
  out.Distribution("latentd_step_sequences", "Sequences of one step.", step_sequences_);
  out.Distribution("latentd_request_prompt_tokens", "Prompt tokens of one request.",
                   request_prompt_tokens_);
  out.Distribution("latentd_request_generation_tokens", "Tokens drawn for one request.",
                   request_generation_tokens_);
  CollectProcess(start_, &out);
  return out.Take();
}

}  // namespace latentd
