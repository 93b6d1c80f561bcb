#ifndef LATENTD_SERVER_CLIENT_BENCH_REPORT_H_
#define LATENTD_SERVER_CLIENT_BENCH_REPORT_H_

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>

#include "latentd/v1/inference.pb.h"
#include "server/client/bench_options.h"
#include "server/client/load_generator.h"
#include "server/client/summary.h"

namespace latentd {

// What a run says. Sorts the samples of `*result`. The schema:
//   schema_version  1; grows when a field changes its meaning
//   started_at      RFC 3339, UTC
//   config          every option by its flag's name, as it was in force
//   model           name, architecture, vocab_size, max_model_len, weights_hash
//   duration_s      first request due to last answer
//   interrupted     whether Ctrl-C ended it
//   requests        sent, completed, failed, cancelled, short, max_in_flight, error_rate
//   errors          by code: count, message of the first
//   tokens          prompt, cached, completion, reasoning: of completed requests
//   throughput      requests_per_s, prompt_tokens_per_s, completion_tokens_per_s
//   latency_ms      ttft, itl, tpot, e2e, send_lag: count and, unless it is 0, mean, min, p50, p90,
//                   p99, max
//   deltas          count, tokens_per_delta, single_token_share; the last two null when unknown
//   client          cpu_s, user_cpu_s, system_cpu_s, deltas_per_cpu_s (null for none)
nlohmann::json MakeReport(const BenchOptions& options, const v1::Model& model,
                          const std::string& started_at, bool interrupted, LoadResult* result);

// The same for people: a few lines with a table of latencies.
std::string FormatReport(const nlohmann::json& report);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BENCH_REPORT_H_
