#ifndef LATENTD_SERVER_BENCH_CLUSTER_MODEL_H_
#define LATENTD_SERVER_BENCH_CLUSTER_MODEL_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/model/config.h"
#include "engine/step.h"
#include "server/bench/exchange_model.h"

namespace latentd {

// A cluster that there need not be: DP attention and EP experts over all its GPUs.
struct ClusterModelOptions {
  int32_t num_nodes = 2;                           // >= 1
  int32_t gpus_per_node = 8;                       // >= 1; a rank each, with a NIC each
  uint64_t gpu_memory_bytes = uint64_t{79} << 30;  // free of one GPU
  int32_t max_step_tokens = 2048;                  // of a rank; >= 1
  int32_t max_sequences = 256;                     // of a rank; >= 1
  bool fp8_cache = false;                          // 644 bytes a token and layer instead of 1,152
  // Rows of the fullest rank's experts over those that even routing gives it; >= 1. Chance comes on
  // top.
  double imbalance = 1.3;
  // Of one drafted token a sequence, in (0, 1]; 0: no MTP.
  double mtp_acceptance = 0;
  ExchangeOptions exchange = {};

  int32_t num_ranks() const { return num_nodes * gpus_per_node; }
};

// How long a step takes, in seconds. The parts that all ranks wait for are those of the slowest.
struct StepCost {
  double attention = 0;  // with projections, norms, head: what a rank does for its own sequences
  double experts = 0;    // routed and shared, dense layers, router
  double exchange = 0;
  double leader = 0;  // the plan to the ranks, their results back

  double seconds() const { return attention + experts + exchange + leader; }
  void Add(const StepCost& other) {
    attention += other.attention;
    experts += other.experts;
    exchange += other.exchange;
    leader += other.leader;
  }
};

// The time of a step and the memory of a rank, from measured kernels (kernel_table.h), a model of
// the wires (exchange_model.h) and assumptions (cluster_facts.h). Immutable; any thread.
//
// A step is, layer by layer, the slowest rank's attention, the all-gather, the experts of the rank
// with most rows, the reduce-scatter; nothing overlaps. Decode steps are padded as the CUDA graphs
// are, and every rank exchanges as many rows as the fullest; experts compute real rows alone. For T
// tokens of all ranks, k of n experts each, on N ranks:
//
//   rows     mean T k / N; the fullest rank has what chance gives the largest of N: mean and
//            deviation of a binomial, times `imbalance` when N > 1
//   experts  hit of a rank's E: each by 1 - (1 - k / n)^T, the largest of N likewise
//
// With MTP a step drafts and verifies one token a sequence, costs what MtpCost() says and yields 1
// + acceptance tokens. The scheduler knows of none of it: a simulated step is one token of each
// sequence, and the part of its time that is decode's is divided by 1 + acceptance. So tokens come
// evenly instead of two at a time.
class ClusterModel {
 public:
  // INVALID_ARGUMENT for an option out of range or a model that was not measured,
  // RESOURCE_EXHAUSTED, with the numbers, when its rank leaves no room for a cache.
  static absl::StatusOr<ClusterModel> Make(const ModelConfig& model,
                                           const ClusterModelOptions& options);

  EngineInfo info() const { return info_; }
  const ClusterModelOptions& options() const { return options_; }
  int64_t cache_tokens() const { return int64_t{info_.num_blocks} * kBlockSize; }  // of a rank
  uint64_t weight_bytes() const { return weight_bytes_; }                          // of a rank

  // REQUIRES: every dp_rank is one of the cluster.
  StepCost Cost(const StepPlan& plan) const;

 private:
  // What one rank has to do in a step.
  struct RankLoad {
    double tokens = 0, sequences = 0, sampled = 0;
    double queries = 0, pairs = 0, squared_pairs = 0;  // absorbed; pairs by sequence, squared
    double absorbed_sequences = 0;
    double chunk_pairs = 0, chunk_keys = 0;
  };

  ClusterModel(const ModelConfig& model, const ClusterModelOptions& options);
  absl::Status PlanMemory();

  std::vector<RankLoad> LoadsOf(const StepPlan& plan, bool decode_only) const;
  // `graph`: padded. `exchanged`: rows of each decoding sequence on the wires.
  StepCost CostOf(const std::vector<RankLoad>& loads, bool graph, double exchanged) const;
  double AttentionUs(const RankLoad& load, double rows) const;
  double ExpertsUs(double total_tokens, double rows) const;

  ModelConfig model_;
  ClusterModelOptions options_;
  EngineInfo info_;
  uint64_t weight_bytes_ = 0;
  double largest_of_ranks_ = 0;  // of as many draws of a normal distribution as there are ranks
};

// The largest of `n` draws of a standard normal distribution, on average. 0 for one.
double ExpectedLargestNormal(int n);

// Rows that a decode step of `sequences` is padded to: graph_cache.h's sizes.
int32_t PaddedSequences(int32_t sequences, int32_t most);

// What a step that drafts and verifies one token a sequence costs, against one that does not, with
// `sequences` on a rank.
double MtpCost(double sequences);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_CLUSTER_MODEL_H_
