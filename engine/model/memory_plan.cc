#include "engine/model/memory_plan.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/step.h"

namespace latentd {
namespace {

// "626.92 GiB", "14.9 MiB".
std::string Size(uint64_t bytes) {
  constexpr double kMib = 1 << 20;
  constexpr double kGib = 1 << 30;
  return bytes >= kGib ? absl::StrFormat("%.2f GiB", bytes / kGib)
                       : absl::StrFormat("%.2f MiB", bytes / kMib);
}

int64_t NumElements(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (int64_t dim : shape) product *= dim;
  return product;
}

// Counts instead of loading.
class Counter : public WeightVisitor {
 public:
  Counter(const ModelConfig& config, MemoryPlan& plan)
      : config_(config),
        plan_(plan),
        experts_(plan.options.placement.Experts(config.n_routed_experts)) {}

  void Tensor(const TensorSpec& spec, TensorView&) override {
    if (!Holds(experts_, spec)) return;
    const int64_t n = NumElements(spec.shape);
    MemoryPlan::Part& part = Count(spec, n);
    // The choice of experts is an argmax of sums with this bias; it is kept exact everywhere.
    const bool exact = spec.kind == WeightKind::kCorrectionBias;
    const uint64_t stored = exact ? 4 : config_.dtype_bytes;
    part.stored_bytes += n * stored;
    part.memory_bytes += n * (exact ? 4 : HeldBytes(stored));
  }

  void Linear(const TensorSpec& spec, LinearWeight&) override {
    if (!Holds(experts_, spec)) return;
    const int64_t n = NumElements(spec.shape);
    MemoryPlan::Part& part = Count(spec, n);
    if (!config_.quantization) {
      part.stored_bytes += n * config_.dtype_bytes;
      part.memory_bytes += n * HeldBytes(config_.dtype_bytes);
      return;
    }
    const uint64_t scale_bytes = NumElements(ScaleShape(*config_.quantization, spec.shape)) * 4;
    const bool converted = plan_.options.weight_storage != WeightStorage::kAsStored;
    part.stored_bytes += n + scale_bytes;
    part.memory_bytes += n * HeldBytes(1) + (converted ? 0 : scale_bytes);
  }

 private:
  MemoryPlan::Part& Count(const TensorSpec& spec, int64_t n) {
    MemoryPlan::Part& part = plan_.parts[static_cast<size_t>(spec.part)];
    part.parameters += n;
    return part;
  }

  uint64_t HeldBytes(uint64_t stored) const {
    switch (plan_.options.weight_storage) {
      case WeightStorage::kAsStored:
        return stored;
      case WeightStorage::kBf16:
        return 2;
      case WeightStorage::kF32:
        return 4;
    }
    return stored;
  }

  const ModelConfig& config_;
  MemoryPlan& plan_;
  const ExpertRange experts_;
};

std::string Row(const std::string& name, const MemoryPlan::Part& part) {
  return absl::StrFormat("%-16s %18d %12s %12s\n", name, part.parameters, Size(part.stored_bytes),
                         Size(part.memory_bytes));
}

}  // namespace

MemoryPlan::Part MemoryPlan::weights() const {
  Part sum;
  for (int i = 0; i < kNumWeightParts; ++i) {
    if (static_cast<WeightPart>(i) == WeightPart::kMtp) continue;
    sum.parameters += parts[i].parameters;
    sum.stored_bytes += parts[i].stored_bytes;
    sum.memory_bytes += parts[i].memory_bytes;
  }
  return sum;
}

int64_t MemoryPlan::BlocksFor(uint64_t available_bytes) const {
  const uint64_t weight_bytes = weights().memory_bytes;
  const uint64_t left = available_bytes - std::min(available_bytes, weight_bytes);
  return static_cast<int64_t>(
      std::min<uint64_t>(left / cache_bytes_per_block, std::numeric_limits<int32_t>::max()));
}

std::string MemoryPlan::ToString() const {
  std::string table =
      absl::StrFormat("%-16s %18s %12s %12s\n", "weights", "parameters", "stored", "in memory");
  for (int i = 0; i < kNumWeightParts; ++i) {
    const auto part = static_cast<WeightPart>(i);
    if (part == WeightPart::kMtp || parts[i].parameters == 0) continue;
    table += Row(std::string(WeightPartName(part)), parts[i]);
  }
  table += Row("all weights", weights());
  if (const Part& mtp = part(WeightPart::kMtp); mtp.parameters > 0) {
    absl::StrAppendFormat(&table, "%-16s %18d %12s %12s\n", "MTP, not loaded", mtp.parameters,
                          Size(mtp.stored_bytes), "-");
  }
  absl::StrAppendFormat(&table, "KV cache: %d bytes a token, %d a block of %d tokens\n",
                        cache_bytes_per_token, cache_bytes_per_block, kBlockSize);
  absl::StrAppendFormat(&table, "KV cache: %d blocks (%d tokens), %s\n", options.num_blocks,
                        int64_t{options.num_blocks} * kBlockSize, Size(cache_bytes()));
  absl::StrAppendFormat(&table, "total: %s\n", Size(total_bytes()));
  return table;
}

MemoryPlan MakeMemoryPlan(const ModelConfig& config, const MemoryPlanOptions& options) {
  MemoryPlan plan;
  plan.options = options;
  Counter counter(config, plan);
  ModelWeights places;  // stays empty of data
  VisitWeights(config, places, counter);
  for (int32_t i = 0; i < config.num_nextn_predict_layers; ++i) VisitMtpLayer(config, i, counter);
  plan.cache_bytes_per_token =
      static_cast<uint64_t>(config.num_hidden_layers) *
      CacheTokenBytes(options.cache_format, config.kv_lora_rank, config.qk_rope_head_dim);
  plan.cache_bytes_per_block = plan.cache_bytes_per_token * kBlockSize;
  return plan;
}

absl::Status CheckFits(const MemoryPlan& plan, uint64_t available_bytes) {
  if (plan.total_bytes() <= available_bytes) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrFormat(
      "too little memory: weights take %s and %d KV cache blocks %s, together %s; %s are "
      "available, "
      "enough for %d blocks",
      Size(plan.weights().memory_bytes), plan.options.num_blocks, Size(plan.cache_bytes()),
      Size(plan.total_bytes()), Size(available_bytes), plan.BlocksFor(available_bytes)));
}

}  // namespace latentd
