#ifndef LATENTD_SERVER_CLIENT_LOAD_GENERATOR_H_
#define LATENTD_SERVER_CLIENT_LOAD_GENERATOR_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/client/bench_options.h"
#include "server/client/interrupts.h"
#include "server/client/workload.h"

namespace latentd {

// What a run measured. Samples are in milliseconds, in no order; four bytes each, kept all, so that
// quantiles are exact.
struct LoadResult {
  struct Error {
    int64_t count = 0;
    std::string message;  // of the first one
  };

  int64_t num_sent = 0;
  int64_t num_completed = 0;            // with an OK status and a whole answer
  int64_t num_cancelled = 0;            // by Ctrl-C; neither completed nor failed
  int64_t num_short = 0;                // completed, with fewer tokens than asked for
  std::map<std::string, Error> errors;  // by code name, and INCOMPLETE_STREAM
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0,
          reasoning_tokens = 0;  // completed ones
  int64_t num_deltas = 0;
  int64_t num_single_token_deltas = 0;  // 0 where token ids were not asked for
  int64_t num_counted_tokens = 0;       // token ids in deltas
  int64_t max_in_flight = 0;
  double duration_s = 0;                    // first request due to last answer
  double user_cpu_s = 0, system_cpu_s = 0;  // of this process meanwhile

  std::vector<float> ttft_ms;      // due to first delta; streams
  std::vector<float> itl_ms;       // between a stream's deltas
  std::vector<float> tpot_ms;      // of each stream: first to last delta, a token after the first
  std::vector<float> e2e_ms;       // due to status
  std::vector<float> send_lag_ms;  // due to handed to gRPC: the client's own lateness

  int64_t num_failed() const;
};

// What is so far, for display.
struct LoadProgress {
  double elapsed_s = 0;
  int64_t num_sent = 0, num_completed = 0, num_failed = 0, num_in_flight = 0;
  int64_t num_deltas = 0;
};

// Sends a workload's requests over gRPC: in closed loop a fixed number at any time, in open loop by
// an arrival process that does not wait for the server. There a request's latency begins when it
// was due, not when it was sent, so that a stall counts for each request that it delayed.
//
// Threads: one that calls Run() (it keeps the time), and `options.threads` that each own a
// completion queue and some connections. A call stays with one of them.
class LoadGenerator {
 public:
  struct Plan {
    int64_t num_requests = 0;  // 0: no limit
    double duration_s = 0;     // 0: no limit
    int64_t concurrency = 0;   // closed loop; 0: open loop
    double request_rate = 0;   // open loop
    int64_t first_index = 0;   // of the workload
  };

  // All three must outlive the generator. The options are finished ones.
  LoadGenerator(const BenchOptions& options, const Workload& workload,
                const Interrupts& interrupts);
  ~LoadGenerator();

  // Runs to the end of the plan, or to Ctrl-C, which cancels what is under way. `on_progress` is
  // called about once a second. Not from two threads at once.
  LoadResult Run(const Plan& plan, const std::function<void(const LoadProgress&)>& on_progress);

 private:
  class Worker;

  const BenchOptions& options_;
  const Workload& workload_;
  const Interrupts& interrupts_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_LOAD_GENERATOR_H_
