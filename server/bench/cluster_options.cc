// The flags of `latentd bench cluster`.

#include <algorithm>
#include <array>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "engine/status.h"
#include "server/bench/cluster_bench.h"
#include "server/bench/cluster_facts.h"

namespace latentd {
namespace {

constexpr std::array<absl::string_view, 6> kWhatIfs = {"nodes", "fp8-cache", "mtp",
                                                       "rails", "even",      "none"};

absl::Status CheckRange(absl::string_view option, double value, double low, double high) {
  if (value >= low && value <= high) return absl::OkStatus();  // also refuses NaN
  return absl::InvalidArgumentError(
      absl::StrFormat("%s is %g; it must lie in [%g, %g]", option, value, low, high));
}

absl::Status CheckWhatIfs(const std::vector<std::string>& what_ifs) {
  for (const std::string& name : what_ifs) {
    if (std::find(kWhatIfs.begin(), kWhatIfs.end(), name) == kWhatIfs.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("--what-if is '", name, "'; known are: ", absl::StrJoin(kWhatIfs, ", ")));
    }
    if (name == "none" && what_ifs.size() > 1) {
      return absl::InvalidArgumentError("--what-if none excludes the others");
    }
  }
  return absl::OkStatus();
}

// An option in another unit than that of the field.
CLI::Option* AddScaled(CLI::App& app, const std::string& name, double scale, double* field,
                       const std::string& help) {
  return app
      .add_option_function<double>(
          name, [scale, field](double value) { *field = value * scale; }, help)
      ->default_str(absl::StrFormat("%g", *field / scale));
}

void AddHardwareOptions(CLI::App& app, ClusterModelOptions* cluster) {
  const auto add = [](CLI::Option* option) { option->capture_default_str()->group("Cluster"); };
  add(app.add_option("--nodes", cluster->num_nodes, "Nodes of the cluster"));
  add(app.add_option("--gpus-per-node", cluster->gpus_per_node, "GPUs, each a rank with a NIC"));
  add(app.add_option("--max-step-tokens", cluster->max_step_tokens, "Of a rank, in a step"));
  add(app.add_option("--max-running", cluster->max_sequences, "Sequences of a rank in a step"));
  add(app.add_flag("--fp8-cache", cluster->fp8_cache, "Latents in FP8: 644 bytes a layer"));
  add(app.add_option("--mtp-acceptance", cluster->mtp_acceptance,
                     "Of one drafted token a sequence, 0 to 1; 0: no speculation"));
  add(app.add_option("--imbalance", cluster->imbalance,
                     "Rows of the fullest rank's experts over those that even routing gives it"));
  app.add_flag_callback(
         "--rails", [cluster] { cluster->exchange.scheme = ExchangeScheme::kRails; },
         "Exchange in two levels instead of rings through all ranks")
      ->group("Cluster");
  AddScaled(app, "--nvlink", 1e9, &cluster->exchange.nvlink_bytes,
            "NVLink of a GPU in one direction, GB/s")
      ->group("Cluster");
  AddScaled(app, "--infiniband", 1e9, &cluster->exchange.infiniband_bytes,
            "NIC of a GPU in one direction, GB/s")
      ->group("Cluster");
  add(app.add_option("--latency-factor", cluster->exchange.latency_factor,
                     "Multiplies NCCL's latencies"));
}

}  // namespace

void AddClusterBenchOptions(CLI::App& app, ClusterBenchOptions* options) {
  app.add_option("--request-rate", options->request_rates,
                 "Open loop: requests a second with Poisson arrivals; several give a run each "
                 "(default: 10 20 40 60 80)")
      ->type_name("RATE ...");
  app.add_option("--concurrency", options->concurrencies,
                 "Closed loop: so many requests under way; several give a run each")
      ->type_name("COUNT ...");
  app.add_option("--prompt-tokens", options->trace.prompt_tokens,
                 "N, MIN:MAX, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA")
      ->capture_default_str();
  app.add_option("--output-tokens", options->trace.output_tokens, "The same forms")
      ->capture_default_str();
  app.add_option("--seed", options->trace.seed, "Of lengths and arrivals")->capture_default_str();
  app.add_option("--warmup", options->run.warmup_s, "Simulated seconds before the measurement")
      ->capture_default_str();
  app.add_option("--duration", options->run.duration_s, "Simulated seconds that are measured")
      ->capture_default_str();
  AddScaled(app, "--ttft-slo", 1e-3, &options->run.ttft_slo_s,
            "Milliseconds to the first token, of a request that counts as good");
  AddScaled(app, "--tpot-slo", 1e-3, &options->run.tpot_slo_s,
            "And mean milliseconds a token after it");
  app.add_option("--gpu-price", options->gpu_price, "Dollars a GPU and hour")
      ->capture_default_str();
  app.add_option("--what-if", options->what_ifs,
                 absl::StrCat("What else to simulate: ", absl::StrJoin(kWhatIfs, ", ")))
      ->type_name("NAME ...")
      ->default_str(absl::StrJoin(options->what_ifs, " "));
  app.add_option("--what-if-acceptance", options->what_if_acceptance, "Of the what-if 'mtp'")
      ->capture_default_str();
  app.add_option("--output", options->output, "File of the JSON lines (default: standard output)");
  app.add_flag("--quiet", options->quiet, "No table on standard error");
  AddHardwareOptions(app, &options->cluster);
  ClusterModelOptions all = options->cluster;
  all.fp8_cache = true;
  all.mtp_acceptance = options->what_if_acceptance;
  app.footer(absl::StrCat("What the simulation rests on:\n", FormatFacts(ClusterFacts(all), 100)));
}

absl::Status FinishClusterBenchOptions(ClusterBenchOptions* options) {
  if (options->request_rates.empty() && options->concurrencies.empty()) {
    options->request_rates = {10, 20, 40, 60, 80};
  }
  for (const double rate : options->request_rates) {
    RETURN_IF_ERROR(CheckRange("--request-rate", rate, 1e-3, 1e5));
  }
  for (const int32_t count : options->concurrencies) {
    RETURN_IF_ERROR(CheckRange("--concurrency", count, 1, 65536));
  }
  RETURN_IF_ERROR(CheckRange("--warmup", options->run.warmup_s, 0, 86400));
  RETURN_IF_ERROR(CheckRange("--duration", options->run.duration_s, 1, 86400));
  RETURN_IF_ERROR(CheckRange("--ttft-slo", 1e3 * options->run.ttft_slo_s, 1, 1e7));
  RETURN_IF_ERROR(CheckRange("--tpot-slo", 1e3 * options->run.tpot_slo_s, 0.1, 1e6));
  RETURN_IF_ERROR(CheckRange("--gpu-price", options->gpu_price, 0, 1000));
  RETURN_IF_ERROR(CheckRange("--what-if-acceptance", options->what_if_acceptance, 0.01, 1));
  return CheckWhatIfs(options->what_ifs);
}

}  // namespace latentd
