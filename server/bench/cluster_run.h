#ifndef LATENTD_SERVER_BENCH_CLUSTER_RUN_H_
#define LATENTD_SERVER_BENCH_CLUSTER_RUN_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "server/bench/cluster_model.h"
#include "server/bench/request_trace.h"
#include "server/client/summary.h"

namespace latentd {

// Open loop: Poisson arrivals of `request_rate` a second, whatever the cluster does. Closed loop:
// `concurrency` requests are under way at any time. One of them is 0.
struct ClusterLoad {
  double request_rate = 0;
  int32_t concurrency = 0;
};

struct ClusterRunOptions {
  double warmup_s = 60;     // simulated, before the measurement
  double duration_s = 120;  // simulated, of the measurement; then nothing arrives any more
  double ttft_slo_s = 2;    // of a request; both as MLPerf's server scenario of DeepSeek-R1
  double tpot_slo_s = 0.08;
  int32_t max_waiting = 1024;  // scheduler's: beyond it requests are refused
};

// Rates are of the `duration_s` that are measured. Latencies, and what became of them, are of the
// requests that arrive in it, the last of which end later.
struct ClusterResult {
  int64_t requests = 0, refused = 0;
  double arrivals_per_s = 0;
  double prompt_tokens_per_s = 0;  // of requests that were admitted
  double output_tokens_per_s = 0;
  double goodput_per_s = 0;  // requests whose TTFT and TPOT are within the limits
  double goodput_share = 0;  // of the requests
  Summary ttft_ms, itl_ms, tpot_ms;
  double step_ms = 0;                    // mean
  double sequences_per_rank = 0;         // running, mean over time
  double cache_mean = 0, cache_max = 0;  // share of all blocks in use
  int64_t preemptions = 0;               // of the whole run
  int64_t steps = 0;
  double mixed_steps = 0;  // share of the steps that compute of prompts
  // Where the time of the steps goes; shares.
  double attention = 0, experts = 0, exchange = 0, leader = 0;
};

// Drives the real scheduler, step by step, over a SimulatedEngine in simulated time. The same
// arguments give the same result.
absl::StatusOr<ClusterResult> RunCluster(const ClusterModel& model, const RequestTrace& trace,
                                         const ClusterLoad& load, uint64_t seed,
                                         const ClusterRunOptions& options);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_CLUSTER_RUN_H_
