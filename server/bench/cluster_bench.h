#ifndef LATENTD_SERVER_BENCH_CLUSTER_BENCH_H_
#define LATENTD_SERVER_BENCH_CLUSTER_BENCH_H_

#include <cstdint>
#include <iosfwd>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/model/config.h"
#include "server/bench/cluster_model.h"
#include "server/bench/cluster_run.h"
#include "server/bench/request_trace.h"

namespace CLI {
class App;
}

namespace latentd {

// Options of `latentd bench cluster`, by the names of the flags.
struct ClusterBenchOptions {
  // Smaller steps than one GPU's default: the exchange pads all ranks to the longest chunk.
  ClusterModelOptions cluster = {.max_step_tokens = 256};
  TraceOptions trace = {};
  ClusterRunOptions run = {};
  std::vector<double> request_rates = {};   // open loop, one run each
  std::vector<int32_t> concurrencies = {};  // closed loop, one run each
  // Of kWhatIfs, each with all loads; "none".
  std::vector<std::string> what_ifs = {"nodes", "fp8-cache", "mtp"};
  double what_if_acceptance = 0.85;  // of "mtp"
  double gpu_price = 2;              // dollars an hour
  std::string output = "";           // file of the JSON lines; empty: standard output
  bool quiet = false;                // no table
};

// Adds the flags, and to the help what is measured and what is assumed.
void AddClusterBenchOptions(CLI::App& app, ClusterBenchOptions* options);

// Fills in the default loads, and refuses what makes no sense, by name, value and limit.
absl::Status FinishClusterBenchOptions(ClusterBenchOptions* options);

// Simulates the cluster and its what-ifs at every load. The options are finished ones. Writes JSON
// lines to `out`: {"name": "basis"}, what is measured and assumed; {"name": "trace"}, the lengths;
// {"name": "cluster"}, each scenario's memory; {"name": "load"}, each run. And for people a table
// to `err`, unless options.quiet.
//
// "nodes": twice the nodes at twice the load. "fp8-cache": an FP8 cache. "mtp": one drafted token.
// "rails": an exchange in two levels. "even": no imbalance but chance's.
absl::Status RunClusterBench(const ModelConfig& model, const ClusterBenchOptions& options,
                             std::ostream& out, std::ostream& err);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_CLUSTER_BENCH_H_
