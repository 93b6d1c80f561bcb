#ifndef LATENTD_ENGINE_CUDA_CUDA_ENGINE_H_
#define LATENTD_ENGINE_CUDA_CUDA_ENGINE_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cuda/gpu_exchange.h"
#include "engine/group_member.h"
#include "engine/model/cache_format.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"
#include "engine/trace_sink.h"

namespace latentd {

struct CudaEngineOptions {
  int32_t device = 0;
  int32_t num_blocks = 0;          // KV cache blocks; 0: all that fit beside the rest
  int32_t max_step_tokens = 8192;  // >= 1
  int32_t max_sequences = 256;     // >= 1
  int32_t max_model_len = 0;       // 0: max_position_embeddings, or what the cache holds
  int32_t max_graph_sequences =
      256;  // decode steps of up to so many sequences run as captured graphs; 0: none
  bool batch_invariant = false;  // a sequence's tokens do not depend on the others; slower (README)
  CacheFormat cache_format = CacheFormat::kBf16;  // or kFp8
  // A rank of an expert-parallel group: the engine loads its share of the experts, and Execute()
  // needs a Join() first. nullopt: the model is alone.
  std::optional<Placement> placement = std::nullopt;
  ExchangeFactory exchanges = nullptr;  // of a rank of a group; nullptr: NcclExchanges()
  TraceSink* trace = nullptr;  // for tests: steps run without graphs and report their tensors
};

// What the engine takes of the GPU's memory, in bytes.
struct CudaMemoryPlan {
  uint64_t weights = 0;
  uint64_t workspace = 0;  // activations, the libraries' scratch memory
  uint64_t graphs = 0;     // an estimate
  uint64_t reserve = 0;    // context, and room for the allocator
  uint64_t cache_per_block = 0;
  int32_t num_blocks = 0;

  uint64_t total() const {
    return weights + workspace + graphs + reserve +
           cache_per_block * static_cast<uint64_t>(num_blocks);
  }
  std::string ToString() const;  // a table to print, lines ending in '\n'
};

// From the config alone: no GPU is touched. `memory_bytes`: what the GPU has free.
// RESOURCE_EXHAUSTED, with the numbers, when the model does not fit; INVALID_ARGUMENT when an
// option is out of range.
absl::StatusOr<CudaMemoryPlan> PlanCudaMemory(const ModelConfig& config,
                                              const CudaEngineOptions& options,
                                              uint64_t memory_bytes);

// The model, or one rank of it, on a Hopper GPU. StepResult::device is always there.
//
// A rank of a group (CudaEngineOptions::placement) gives, as GroupMember says, a share of each
// plan: StepPlan::shape alone decides what all ranks exchange, so it has to be the same for all of
// them. An error of a step that is not a sequence's own takes the rank out of the group: its peers
// are in the middle of the step. Join() captures the graphs again and keeps the weights.
//
// Execute() fails with UNAVAILABLE, naming rank and call, when CUDA does; with INTERNAL, naming the
// sequence, for a logit that is not finite; with INVALID_ARGUMENT for a plan that PlanCheck refuses
// or that has more suppressed tokens than max(vocab_size, 256 * max_sequences).
class CudaEngine : public GroupMember {
 public:
  // Called once, before anything large is allocated.
  using OnPlan = std::function<void(const CudaMemoryPlan&)>;

  // UNAVAILABLE without a driver or a GPU of compute capability 9.0, RESOURCE_EXHAUSTED when the
  // model does not fit.
  static absl::StatusOr<std::unique_ptr<CudaEngine>> Create(
      const ModelConfig& config, const std::filesystem::path& dir, LoadFormat format,
      const CudaEngineOptions& options, const OnPlan& on_plan, const LoadProgress& progress);

  // Seconds that the GPU stood idle between the end of the last step and the begin of this one, and
  // that this step took; of the last Execute(). The thread of Execute().
  struct StepTimes {
    double idle_s = 0;
    double busy_s = 0;
    bool graph = false;
  };
  virtual StepTimes last_step() const = 0;

  // Executes `plan` with timestamps between its kernels, and says where the time went, families in
  // the order of their first kernel. Pure decode runs as a graph made for this call, everything
  // else launch by launch. A timestamp keeps a kernel from beginning before the one ahead of it has
  // ended, so the sum exceeds StepTimes::busy_s. For benchmarks: takes a fraction of a second. The
  // thread of Execute().
  struct FamilyTime {
    std::string_view family;  // "experts", "attention", ...
    double seconds = 0;
    int intervals = 0;  // between timestamps, about one a kernel
  };
  virtual absl::StatusOr<std::vector<FamilyTime>> Profile(const StepPlan& plan) = 0;
};

// How many Hopper GPUs (compute capability 9.0) the driver shows; 0 without a driver.
int CudaDeviceCount();

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_CUDA_ENGINE_H_
