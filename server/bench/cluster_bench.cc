#include "server/bench/cluster_bench.h"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <ostream>
#include <tuple>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/status.h"
#include "server/bench/cluster_facts.h"

namespace latentd {
namespace {

using Json = nlohmann::ordered_json;

constexpr int kTraceSample = 20000;  // requests whose lengths are shown

// One cluster to simulate, and by how much its loads are those that were asked for.
struct Scenario {
  std::string name;
  ClusterModelOptions cluster;
  double load = 1;
};

std::string ScenarioName(const ClusterModelOptions& cluster) {
  return absl::StrCat("EP", cluster.num_ranks(), cluster.fp8_cache ? ", FP8 cache" : "",
                      cluster.mtp_acceptance > 0 ? ", MTP" : "",
                      cluster.exchange.scheme == ExchangeScheme::kRails ? ", rails" : "");
}

std::vector<Scenario> Scenarios(const ClusterBenchOptions& options) {
  std::vector<Scenario> scenarios = {{ScenarioName(options.cluster), options.cluster}};
  for (const std::string& what_if : options.what_ifs) {
    if (what_if == "none") continue;
    Scenario scenario = {"", options.cluster};
    ClusterModelOptions& cluster = scenario.cluster;
    if (what_if == "nodes") {
      cluster.num_nodes *= 2;
      scenario.load = 2;
    } else if (what_if == "fp8-cache") {
      cluster.fp8_cache = true;
    } else if (what_if == "mtp") {
      cluster.mtp_acceptance = options.what_if_acceptance;
    } else if (what_if == "rails") {
      cluster.exchange.scheme = ExchangeScheme::kRails;
    } else {
      cluster.imbalance = 1;
    }
    scenario.name = absl::StrCat(ScenarioName(cluster), what_if == "even" ? ", even routing" : "");
    scenarios.push_back(std::move(scenario));
  }
  return scenarios;
}

// Figures as they are read: four digits.
double Rounded(double value) {
  double number = value;
  [[maybe_unused]] const bool parsed = absl::SimpleAtod(absl::StrFormat("%.4g", value), &number);
  return number;
}

Json ToJson(const Summary& summary) {
  if (summary.count == 0) return {{"count", 0}};
  return {{"count", summary.count},
          {"mean", Rounded(summary.mean)},
          {"p50", Rounded(summary.p50)},
          {"p90", Rounded(summary.p90)},
          {"p99", Rounded(summary.p99)}};
}

class Bench {
 public:
  Bench(const ModelConfig& model, const ClusterBenchOptions& options, std::ostream& out,
        std::ostream& err)
      : model_(model), options_(options), out_(out), err_(err) {}

  absl::Status Run() {
    const std::vector<Scenario> scenarios = Scenarios(options_);
    WriteBasis(scenarios);
    for (const Scenario& scenario : scenarios) {
      const absl::Status status = RunScenario(scenario);
      if (!status.ok()) {
        return absl::Status(status.code(), absl::StrCat(scenario.name, ": ", status.message()));
      }
    }
    out_.flush();
    return out_ ? absl::OkStatus() : absl::DataLossError("cannot write the JSON lines");
  }

 private:
  void Write(const Json& line) { out_ << line.dump() << "\n" << std::flush; }
  void Show(const std::string& text) {
    if (!options_.quiet) err_ << text << std::flush;
  }

  // What all scenarios together rest on.
  void WriteBasis(const std::vector<Scenario>& scenarios) {
    ClusterModelOptions all = options_.cluster;
    for (const Scenario& scenario : scenarios) {
      all.fp8_cache = all.fp8_cache || scenario.cluster.fp8_cache;
      all.mtp_acceptance = std::max(all.mtp_acceptance, scenario.cluster.mtp_acceptance);
    }
    const std::vector<Fact> facts = ClusterFacts(all);
    Json line = {{"name", "basis"}, {"facts", Json::array()}};
    for (const Fact& fact : facts) {
      line["facts"].push_back({{"origin", std::string(OriginName(fact.origin))},
                               {"what", fact.what},
                               {"value", fact.value},
                               {"source", fact.source}});
    }
    Write(line);
    Show(absl::StrCat("A simulation. It rests on:\n", FormatFacts(facts, 120), "\n"));
  }

  void WriteTrace(const RequestTrace& trace) {
    std::vector<float> prompt, output;
    for (int i = 0; i < kTraceSample; ++i) {
      const RequestTrace::Lengths lengths = trace.LengthsOf(i);
      prompt.push_back(static_cast<float>(lengths.prompt));
      output.push_back(static_cast<float>(lengths.output));
    }
    const Summary p = Summarize(&prompt), o = Summarize(&output);
    Write({{"name", "trace"},
           {"seed", options_.trace.seed},
           {"arrivals", "poisson"},
           {"prompt_tokens", options_.trace.prompt_tokens},
           {"output_tokens", options_.trace.output_tokens},
           {"prompt", ToJson(p)},
           {"output", ToJson(o)}});
    for (const auto& [name, form, summary] :
         {std::tuple("prompts", &options_.trace.prompt_tokens, &p),
          std::tuple("answers", &options_.trace.output_tokens, &o)}) {
      Show(absl::StrFormat("%s: %s tokens; mean %.0f, p50 %.0f, p90 %.0f, p99 %.0f\n", name, *form,
                           summary->mean, summary->p50, summary->p90, summary->p99));
    }
    Show(absl::StrFormat("good: TTFT up to %g ms and TPOT up to %g ms; a GPU costs $%g an hour\n\n",
                         1e3 * options_.run.ttft_slo_s, 1e3 * options_.run.tpot_slo_s,
                         options_.gpu_price));
  }

  absl::Status RunScenario(const Scenario& scenario) {
    ASSIGN_OR_RETURN(const ClusterModel model, ClusterModel::Make(model_, scenario.cluster));
    ASSIGN_OR_RETURN(const RequestTrace trace, RequestTrace::Make(options_.trace, model.info()));
    if (!std::exchange(trace_written_, true)) WriteTrace(trace);
    WriteCluster(scenario, model);
    for (const double rate : options_.request_rates) {
      RETURN_IF_ERROR(RunLoad(scenario, model, trace, {.request_rate = rate * scenario.load}));
    }
    for (const int32_t count : options_.concurrencies) {
      RETURN_IF_ERROR(RunLoad(scenario, model, trace,
                              {.concurrency = static_cast<int32_t>(count * scenario.load)}));
    }
    Show("\n");
    return absl::OkStatus();
  }

  void WriteCluster(const Scenario& scenario, const ClusterModel& model) {
    const ClusterModelOptions& cluster = scenario.cluster;
    Write({{"name", "cluster"},
           {"scenario", scenario.name},
           {"nodes", cluster.num_nodes},
           {"gpus", cluster.num_ranks()},
           {"weights_gb_per_gpu", Rounded(model.weight_bytes() * 1e-9)},
           {"cache_tokens_per_gpu", model.cache_tokens()},
           {"fp8_cache", cluster.fp8_cache},
           {"mtp_acceptance", cluster.mtp_acceptance},
           {"imbalance", cluster.imbalance},
           {"exchange", cluster.exchange.scheme == ExchangeScheme::kRing ? "ring" : "rails"},
           {"max_step_tokens", cluster.max_step_tokens},
           {"max_running", cluster.max_sequences}});
    Show(absl::StrFormat(
        "%s: %d nodes of %d H100; of each GPU %.1f GB of weights, %d tokens of cache\n",
        scenario.name, cluster.num_nodes, cluster.gpus_per_node, model.weight_bytes() * 1e-9,
        model.cache_tokens()));
    Show(absl::StrFormat("%9s %8s %7s %18s %18s %14s %8s %5s %6s %7s\n", "load", "out tok/s",
                         "per GPU", "TTFT p50/90/99 ms", "ITL p50/90/99 ms", "good req/s (%)",
                         "seq/rank", "KV %", "wire %", "$/M out"));
  }

  absl::Status RunLoad(const Scenario& scenario, const ClusterModel& model,
                       const RequestTrace& trace, const ClusterLoad& load) {
    ASSIGN_OR_RETURN(const ClusterResult r,
                     RunCluster(model, trace, load, options_.trace.seed, options_.run));
    const int32_t gpus = scenario.cluster.num_ranks();
    const double dollars = options_.gpu_price * gpus / 3600;
    const auto per_million = [dollars](double per_second) {
      return per_second > 0 ? Json(Rounded(dollars * 1e6 / per_second)) : Json(nullptr);
    };
    Json line = {{"name", "load"}, {"scenario", scenario.name}};
    if (load.concurrency > 0) {
      line["concurrency"] = load.concurrency;
    } else {
      line["request_rate"] = load.request_rate;
    }
    line.update({{"requests", r.requests},
                 {"refused", r.refused},
                 {"requests_per_s", Rounded(r.arrivals_per_s)},
                 {"prompt_tok_s", Rounded(r.prompt_tokens_per_s)},
                 {"output_tok_s", Rounded(r.output_tokens_per_s)},
                 {"output_tok_s_per_gpu", Rounded(r.output_tokens_per_s / gpus)},
                 {"ttft_ms", ToJson(r.ttft_ms)},
                 {"itl_ms", ToJson(r.itl_ms)},
                 {"tpot_ms", ToJson(r.tpot_ms)},
                 {"goodput_requests_per_s", Rounded(r.goodput_per_s)},
                 {"goodput_share", Rounded(r.goodput_share)},
                 {"sequences_per_rank", Rounded(r.sequences_per_rank)},
                 {"kv_use_mean", Rounded(r.cache_mean)},
                 {"kv_use_max", Rounded(r.cache_max)},
                 {"preemptions", r.preemptions},
                 {"steps", r.steps},
                 {"step_ms", Rounded(r.step_ms)},
                 {"mixed_steps", Rounded(r.mixed_steps)},
                 {"time_share",
                  {{"attention", Rounded(r.attention)},
                   {"experts", Rounded(r.experts)},
                   {"exchange", Rounded(r.exchange)},
                   {"leader", Rounded(r.leader)}}},
                 {"dollars_per_million_output", per_million(r.output_tokens_per_s)},
                 {"dollars_per_million_total",
                  per_million(r.output_tokens_per_s + r.prompt_tokens_per_s)}});
    Write(line);
    Show(TableRow(load, r, gpus, dollars));
    return absl::OkStatus();
  }

  static std::string Three(const Summary& s) {
    return absl::StrFormat("%.0f/%.0f/%.0f", s.p50, s.p90, s.p99);
  }

  static std::string TableRow(const ClusterLoad& load, const ClusterResult& r, int32_t gpus,
                              double dollars) {
    return absl::StrFormat("%9s %8.0f %7.0f %18s %18s %14s %8.0f %5.1f %6.0f %7.2f%s\n",
                           load.concurrency > 0 ? absl::StrCat("conc ", load.concurrency)
                                                : absl::StrFormat("%g/s", load.request_rate),
                           r.output_tokens_per_s, r.output_tokens_per_s / gpus, Three(r.ttft_ms),
                           Three(r.itl_ms),
                           absl::StrFormat("%.1f (%.0f)", r.goodput_per_s, 100 * r.goodput_share),
                           r.sequences_per_rank, 100 * r.cache_mean, 100 * r.exchange,
                           r.output_tokens_per_s > 0 ? dollars * 1e6 / r.output_tokens_per_s : 0,
                           r.refused > 0 ? absl::StrFormat("  %d refused", r.refused) : "");
  }

  const ModelConfig& model_;
  const ClusterBenchOptions& options_;
  std::ostream& out_;
  std::ostream& err_;
  bool trace_written_ = false;
};

}  // namespace

absl::Status RunClusterBench(const ModelConfig& model, const ClusterBenchOptions& options,
                             std::ostream& out, std::ostream& err) {
  if (options.output.empty()) return Bench(model, options, out, err).Run();
  std::ofstream file(options.output);
  if (!file) return absl::NotFoundError(absl::StrCat("--output: cannot write ", options.output));
  return Bench(model, options, file, err).Run();
}

}  // namespace latentd
