// What the CUDA engine takes of the GPU's memory, from the config alone.

#include <algorithm>
#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/cuda/cublas.h"
#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/engine_limits.h"
#include "engine/cuda/gpu_weights.h"
#include "engine/cuda/graph_cache.h"
#include "engine/cuda/kernels/mla_cache.h"
#include "engine/cuda/step_buffers.h"
#include "engine/cuda/step_input.h"
#include "engine/status.h"

namespace latentd {
namespace {

// The kernels' code and stacks, cuBLASLt's own memory, and what the driver rounds up: a good part
// of it is taken after the plan is made.
constexpr uint64_t kReserveBytes = uint64_t{512} << 20;
// What NCCL takes for the channels to the other ranks: an estimate.
constexpr uint64_t kNcclBytes = uint64_t{1} << 30;
// Options beyond these are mistakes.
constexpr int32_t kMaxStepTokens = 1 << 18;
constexpr int32_t kMaxSequences = 1 << 14;
constexpr int32_t kMaxRanks = 1 << 10;

absl::Status CheckOption(const char* name, int64_t value, int64_t lowest, int64_t highest) {
  if (value < lowest)
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", value, "; the least is ", lowest));
  if (value > highest)
    return absl::InvalidArgumentError(absl::StrCat(name, ": ", value, "; the most is ", highest));
  return absl::OkStatus();
}

std::string Gib(uint64_t bytes) { return absl::StrFormat("%.2f GiB", bytes / double{1 << 30}); }

}  // namespace

absl::Status CheckCudaOptions(const ModelConfig& config, const CudaEngineOptions& options) {
  constexpr int32_t kAny = std::numeric_limits<int32_t>::max();
  RETURN_IF_ERROR(CheckOption("device", options.device, 0, kAny));
  RETURN_IF_ERROR(CheckOption("num_blocks", options.num_blocks, 0, kAny));
  RETURN_IF_ERROR(CheckOption("max_step_tokens", options.max_step_tokens, 1, kMaxStepTokens));
  RETURN_IF_ERROR(CheckOption("max_sequences", options.max_sequences, 1, kMaxSequences));
  RETURN_IF_ERROR(CheckOption("max_graph_sequences", options.max_graph_sequences, 0, kAny));
  RETURN_IF_ERROR(CheckOption("max_model_len", options.max_model_len, 0, kAny));
  if (options.cache_format == CacheFormat::kF32)
    return absl::InvalidArgumentError("cache_format: f32; possible are bf16 and fp8");
  const Placement placement = PlacementOf(options);
  RETURN_IF_ERROR(CheckOption("world_size", placement.world_size, 1, kMaxRanks));
  RETURN_IF_ERROR(CheckOption("rank", placement.rank, 0, placement.world_size - 1));
  if (options.max_model_len <= config.max_position_embeddings) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("max_model_len: ", options.max_model_len,
                                                 "; the model's max_position_embeddings is ",
                                                 config.max_position_embeddings));
}

int32_t MaxModelLen(const ModelConfig& config, const CudaEngineOptions& options) {
  return options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
}

int32_t MaxGraphSequences(const CudaEngineOptions& options) {
  if (options.trace != nullptr) return 0;
  return std::min({options.max_graph_sequences, options.max_sequences, options.max_step_tokens});
}

absl::StatusOr<CudaMemoryPlan> PlanCudaMemory(const ModelConfig& config,
                                              const CudaEngineOptions& options,
                                              uint64_t memory_bytes) {
  RETURN_IF_ERROR(CheckCudaSupports(config));
  RETURN_IF_ERROR(CheckCudaOptions(config, options));
  const int32_t max_model_len = MaxModelLen(config, options);
  const StepLimits limits = MakeStepLimits(config, options, max_model_len);
  CudaMemoryPlan plan;
  plan.weights = GpuWeightBytes(config, max_model_len, PlacementOf(options));
  Carver carver(nullptr);
  CarveStepBuffers(config, limits, kMaxMultiprocessors, carver);
  plan.workspace =
      carver.used() + Cublas::kWorkspaceBytes +
      StepInput::DeviceBytes(limits, DecodePlannerOptions(config, limits, kMaxMultiprocessors));
  plan.graphs =
      GraphSizes(MaxGraphSequences(options)).size() * EstimatedGraphBytes(config.num_hidden_layers);
  plan.reserve = kReserveBytes + (limits.world_size > 1 ? kNcclBytes : 0);
  plan.cache_per_block = config.num_hidden_layers * MlaCacheBlockBytes(options.cache_format);

  const uint64_t fixed = plan.total();
  const uint64_t left = memory_bytes - std::min(memory_bytes, fixed);
  const uint64_t fit = std::min<uint64_t>(left / plan.cache_per_block,
                                          std::numeric_limits<int32_t>::max() / kBlockSize);
  plan.num_blocks = options.num_blocks > 0 ? options.num_blocks : static_cast<int32_t>(fit);
  if (plan.num_blocks > 0 && static_cast<uint64_t>(plan.num_blocks) <= fit) return plan;
  return absl::ResourceExhaustedError(
      absl::StrCat("the model does not fit on the GPU: weights take ", Gib(plan.weights),
                   ", workspace ", Gib(plan.workspace), ", graphs and reserve ",
                   Gib(plan.graphs + plan.reserve), " and ", std::max(plan.num_blocks, 1),
                   " KV cache blocks ", Gib(plan.cache_per_block * std::max(plan.num_blocks, 1)),
                   "; ", Gib(memory_bytes), " are free, enough for ", fit, " blocks"));
}

std::string CudaMemoryPlan::ToString() const {
  std::string table = absl::StrFormat("%-16s %12s\n", "GPU memory", "bytes");
  const auto row = [&](const char* name, uint64_t bytes) {
    absl::StrAppendFormat(&table, "%-16s %12s\n", name, Gib(bytes));
  };
  row("weights", weights);
  row("workspace", workspace);
  row("graphs", graphs);
  row("reserve", reserve);
  row("KV cache", cache_per_block * static_cast<uint64_t>(num_blocks));
  row("total", total());
  absl::StrAppendFormat(&table, "KV cache: %d blocks (%d tokens), %d bytes a block\n", num_blocks,
                        int64_t{num_blocks} * kBlockSize, cache_per_block);
  return table;
}

}  // namespace latentd
