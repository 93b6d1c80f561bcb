#include "server/bench/cluster_model.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <tuple>

#include "absl/strings/str_format.h"
#include "engine/model/memory_plan.h"
#include "engine/model/placement.h"
#include "engine/status.h"
#include "server/bench/kernel_table.h"

namespace latentd {
namespace {

// What absorbed attention takes with an FP8 cache, against bf16: measured, 1.1 to 1.46 by size.
constexpr double kFp8CacheCost = 1.33;

// What a rank takes beside weights, cache and exchange. Derived: on one H100 with 79 GiB free the
// engine left 276,000 tokens of cache beside shard16's weights, in steps of up to 8,192 tokens.
constexpr uint64_t kWorkspaceBytes = 4'450'000'000;
// NCCL's buffers and channels; assumed.
constexpr uint64_t kNcclBytes = 1'500'000'000;

// From a step's end to the next's begin, beyond what the measured steps of one GPU have in them:
// plan to the ranks' processes and results back. Assumed: the most that is wanted of the leader.
constexpr double kLeaderSeconds = 1e-3;

// The most that a step with one draft a sequence may cost (assumed to be met): by sequences.
constexpr double kMtpCostOfOne = 1.45, kMtpCostOfMany = 1.25, kMtpMany = 8;

double Squared(double x) { return x * x; }

absl::Status CheckRange(const char* option, double value, double low, double high) {
  if (value >= low && value <= high) return absl::OkStatus();  // also refuses NaN
  return absl::InvalidArgumentError(
      absl::StrFormat("%s is %g; it must lie in [%g, %g]", option, value, low, high));
}

absl::Status CheckOptions(const ClusterModelOptions& options) {
  const ExchangeOptions& exchange = options.exchange;
  using Limit = std::tuple<const char*, double, double, double>;
  for (const auto& [option, value, low, high] :
       {Limit{"--nodes", options.num_nodes, 1, 64},
        Limit{"--gpus-per-node", options.gpus_per_node, 1, 16},
        Limit{"--max-step-tokens", options.max_step_tokens, 1, 65536},
        Limit{"--max-running", options.max_sequences, 1, 4096},
        Limit{"--imbalance", options.imbalance, 1, 256},
        Limit{"--mtp-acceptance", options.mtp_acceptance, 0, 1},
        Limit{"--nvlink", exchange.nvlink_bytes * 1e-9, 1, 10000},
        Limit{"--infiniband", exchange.infiniband_bytes * 1e-9, 0.1, 1000},
        Limit{"--latency-factor", exchange.latency_factor, 0, 1000}}) {
    RETURN_IF_ERROR(CheckRange(option, value, low, high));
  }
  return absl::OkStatus();
}

// Whether the engine takes the absorbed form of attention: for single tokens, and for a short chunk
// behind a long context, as PreferAbsorbed() of its mla_prefill.h has it.
bool Absorbed(const SequenceStep& s) {
  const double queries = s.num_tokens, before = s.num_computed_tokens;
  const double pairs = queries * (before + (queries + 1) / 2);
  return queries == 1 || pairs * 2 * (576 + 512 - 192 - 128) < before * 4 * 128 * 512;
}

// A decoding sequence, which MTP speeds up.
bool Decodes(const SequenceStep& s) { return s.num_tokens == 1 && s.sample; }

}  // namespace

double ExpectedLargestNormal(int n) {
  // The integral of 1 - F(x)^n over x > 0 less that of F(x)^n over x < 0.
  constexpr double kStep = 1e-3, kEnd = 8;
  double sum = 0;
  for (double x = kStep / 2; x < kEnd; x += kStep) {
    const double above = std::erfc(x / std::numbers::sqrt2) / 2;
    sum += 1 - std::pow(1 - above, n) - std::pow(above, n);
  }
  return n > 1 ? sum * kStep : 0;
}

int32_t PaddedSequences(int32_t sequences, int32_t most) {
  int32_t size = 1;
  while (size < sequences && size < most) {
    size += size < 4 ? size : size < 8 ? 4 : size < 64 ? 8 : size < 128 ? 16 : size < 256 ? 32 : 64;
  }
  return std::max(sequences, std::min(size, most));
}

double MtpCost(double sequences) {
  const double share =
      std::clamp(std::log(std::max(sequences, 1.0)) / std::log(kMtpMany), 0.0, 1.0);
  return kMtpCostOfOne + (kMtpCostOfMany - kMtpCostOfOne) * share;
}

ClusterModel::ClusterModel(const ModelConfig& model, const ClusterModelOptions& options)
    : model_(model), options_(options) {
  largest_of_ranks_ = ExpectedLargestNormal(options.num_ranks());
}

absl::StatusOr<ClusterModel> ClusterModel::Make(const ModelConfig& model,
                                                const ClusterModelOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options));
  RETURN_IF_ERROR(KernelTable::CheckModel(model));
  if (options.mtp_acceptance > 0 && model.num_nextn_predict_layers == 0) {
    return absl::InvalidArgumentError("--mtp-acceptance: the model has no MTP layer");
  }
  ClusterModel cluster(model, options);
  RETURN_IF_ERROR(cluster.PlanMemory());
  return cluster;
}

absl::Status ClusterModel::PlanMemory() {
  const bool mtp = options_.mtp_acceptance > 0;
  const MemoryPlan plan = MakeMemoryPlan(
      model_, {.cache_format = options_.fp8_cache ? CacheFormat::kFp8 : CacheFormat::kBf16,
               .placement = {.rank = 0, .world_size = options_.num_ranks()}});
  // kv_b_proj is held in bf16, split for absorption.
  const uint64_t layers = model_.num_hidden_layers + (mtp ? 1 : 0);
  const uint64_t kv_b = uint64_t{1} * model_.num_attention_heads * model_.kv_lora_rank *
                        (model_.qk_nope_head_dim + model_.v_head_dim);
  weight_bytes_ = plan.weights().memory_bytes + layers * kv_b;
  if (mtp) {
    // The checkpoint repeats embedding and head in the MTP layer; they are held once.
    weight_bytes_ += plan.part(WeightPart::kMtp).memory_bytes -
                     plan.part(WeightPart::kEmbedding).memory_bytes -
                     plan.part(WeightPart::kHead).memory_bytes;
  }
  const uint64_t token_bytes = plan.cache_bytes_per_token / model_.num_hidden_layers * layers;
  uint64_t other = kWorkspaceBytes;
  if (options_.num_ranks() > 1) {
    const double row = DispatchBytes(model_.hidden_size, model_.num_experts_per_tok) +
                       CombineBytes(model_.hidden_size);
    other +=
        kNcclBytes + static_cast<uint64_t>(row * options_.max_step_tokens * options_.num_ranks());
  }
  const uint64_t used = weight_bytes_ + other;
  const uint64_t left = options_.gpu_memory_bytes - std::min(options_.gpu_memory_bytes, used);
  const uint64_t blocks = std::min<uint64_t>(left / (token_bytes * kBlockSize),
                                             std::numeric_limits<int32_t>::max() / kBlockSize);
  if (blocks == 0) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("a rank of %d does not fit: weights take %.1f GB and everything else %.1f "
                        "GB of the %.1f GB "
                        "of --gpu-memory; more nodes leave fewer experts to each",
                        options_.num_ranks(), weight_bytes_ * 1e-9, other * 1e-9,
                        options_.gpu_memory_bytes * 1e-9));
  }
  info_ = {.num_blocks = static_cast<int32_t>(blocks),
           .num_dp_ranks = options_.num_ranks(),
           .max_step_tokens = options_.max_step_tokens,
           .max_sequences = options_.max_sequences,
           .max_model_len = static_cast<int32_t>(
               std::min<uint64_t>(model_.max_position_embeddings, blocks * kBlockSize)),
           .vocab_size = model_.vocab_size};
  return absl::OkStatus();
}

StepCost ClusterModel::Cost(const StepPlan& plan) const {
  const bool decode = std::all_of(plan.sequences.begin(), plan.sequences.end(), Decodes);
  StepCost all = CostOf(LoadsOf(plan, /*decode_only=*/false), decode, 1);
  if (options_.mtp_acceptance == 0) return all;
  const std::vector<RankLoad> decoding = LoadsOf(plan, /*decode_only=*/true);
  const StepCost once = CostOf(decoding, decode, 1), twice = CostOf(decoding, decode, 2);
  double sequences = 0;
  for (const RankLoad& load : decoding) sequences = std::max(sequences, load.sequences);
  if (sequences == 0) return all;
  const double tokens = 1 + options_.mtp_acceptance, factor = MtpCost(sequences);
  all.attention += once.attention * (factor / tokens - 1);
  all.experts += once.experts * (factor / tokens - 1);
  all.exchange += twice.exchange / tokens - once.exchange;
  all.leader += once.leader * (1 / tokens - 1);
  return all;
}

std::vector<ClusterModel::RankLoad> ClusterModel::LoadsOf(const StepPlan& plan,
                                                          bool decode_only) const {
  std::vector<RankLoad> loads(options_.num_ranks());
  for (const SequenceStep& s : plan.sequences) {
    if (decode_only && !Decodes(s)) continue;
    RankLoad& load = loads[s.dp_rank];
    const double tokens = s.num_tokens, keys = s.num_computed_tokens + tokens;
    load.tokens += tokens;
    load.sequences += 1;
    load.sampled += s.sample;
    if (Absorbed(s)) {
      load.queries += tokens;
      load.absorbed_sequences += 1;
      load.pairs += tokens * keys;
      load.squared_pairs += Squared(tokens * keys);
    } else {
      load.chunk_pairs += tokens * (s.num_computed_tokens + (tokens + 1) / 2);  // causal
      load.chunk_keys += keys;
    }
  }
  return loads;
}

double ClusterModel::AttentionUs(const RankLoad& load, double rows) const {
  double variation = 0;
  if (load.absorbed_sequences > 0) {
    const double mean = load.pairs / load.absorbed_sequences;
    variation =
        std::sqrt(std::max(0.0, load.squared_pairs / load.absorbed_sequences - Squared(mean))) /
        mean;
  }
  const double layer = KernelTable::Projections(rows) + KernelTable::Absorption(load.queries) +
                       KernelTable::SmallKernels(rows) +
                       KernelTable::AbsorbedAttention(load.pairs, variation) *
                           (options_.fp8_cache ? kFp8CacheCost : 1) +
                       KernelTable::ChunkAttention(load.chunk_pairs, load.chunk_keys);
  return layer * model_.num_hidden_layers + KernelTable::Head(load.sampled) +
         KernelTable::Sampling(load.sampled);
}

double ClusterModel::ExpertsUs(double total_tokens, double rows) const {
  const int32_t ranks = options_.num_ranks();
  const double moe_layers = std::max(0, model_.num_hidden_layers - model_.first_k_dense_replace);
  const double per_token =
      static_cast<double>(model_.num_experts_per_tok) / model_.n_routed_experts;
  const double local = LocalExperts(model_.n_routed_experts, 0, ranks).count;
  const auto largest = [this](double mean, double variance) {
    return mean + largest_of_ranks_ * std::sqrt(variance);
  };
  const double hit = 1 - std::pow(1 - per_token, total_tokens);
  const double experts = std::min(local, largest(local * hit, local * hit * (1 - hit)));
  const double share = local / model_.n_routed_experts;
  const double mean_rows = total_tokens * model_.num_experts_per_tok * share;
  const double most_rows =
      largest(mean_rows, mean_rows * (1 - share)) * (ranks > 1 ? options_.imbalance : 1);
  const double moe = KernelTable::RoutedExperts(experts, std::max(most_rows, experts)) +
                     KernelTable::SharedExpert(rows) +
                     KernelTable::Router(rows, model_.n_routed_experts);
  const double dense = KernelTable::DenseMlp(rows);
  return moe * moe_layers + dense * (model_.num_hidden_layers - moe_layers);
}

StepCost ClusterModel::CostOf(const std::vector<RankLoad>& loads, bool graph,
                              double exchanged) const {
  double most = 0, total = 0;
  for (const RankLoad& load : loads) {
    most = std::max(most, load.tokens);
    total += load.tokens;
  }
  if (total == 0) return {};
  const double rows =
      graph ? PaddedSequences(static_cast<int32_t>(most), options_.max_sequences) : most;
  StepCost cost;
  for (const RankLoad& load : loads) {
    const double us = AttentionUs(load, graph ? rows : load.tokens);
    cost.attention = std::max(cost.attention, us * 1e-6);
  }
  cost.experts = ExpertsUs(total, rows) * 1e-6;
  if (options_.num_ranks() > 1) {
    const auto collective = [&](double row_bytes) {
      return CollectiveSeconds(options_.exchange, options_.num_nodes, options_.gpus_per_node,
                               row_bytes * rows * exchanged);
    };
    const double layer = collective(DispatchBytes(model_.hidden_size, model_.num_experts_per_tok)) +
                         collective(CombineBytes(model_.hidden_size));
    cost.exchange = layer * (model_.num_hidden_layers - model_.first_k_dense_replace);
    cost.leader = kLeaderSeconds;
  }
  return cost;
}

}  // namespace latentd
