#ifndef LATENTD_ENGINE_MODEL_MEMORY_PLAN_H_
#define LATENTD_ENGINE_MODEL_MEMORY_PLAN_H_

#include <array>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/cache_format.h"
#include "engine/model/config.h"
#include "engine/model/layout.h"
#include "engine/model/placement.h"

namespace latentd {

// How an engine holds the weights that it has read. Scales and norms are small and stay as they
// are.
enum class WeightStorage {
  kAsStored,  // FP8 where the config has quantisation, else its dtype
  kBf16,
  kF32,
};

struct MemoryPlanOptions {
  WeightStorage weight_storage = WeightStorage::kAsStored;
  CacheFormat cache_format = CacheFormat::kF32;
  int32_t num_blocks = 0;    // KV cache blocks of kBlockSize tokens; >= 0
  Placement placement = {};  // of the rank whose plan it is
};

// What serving a model takes of one rank, from its config alone: no weight is looked at. Bytes and
// counts are of the main model; the MTP layers' are told apart and are in no total.
struct MemoryPlan {
  struct Part {
    int64_t parameters = 0;
    uint64_t stored_bytes = 0;  // read of a checkpoint: FP8 with scales, else the config's dtype
    uint64_t memory_bytes = 0;  // as the engine holds them
  };
  std::array<Part, kNumWeightParts> parts;  // by WeightPart

  MemoryPlanOptions options;
  uint64_t cache_bytes_per_token = 0;  // of all layers
  uint64_t cache_bytes_per_block = 0;

  const Part& part(WeightPart part) const { return parts[static_cast<size_t>(part)]; }
  Part weights() const;  // all parts but kMtp
  uint64_t cache_bytes() const { return cache_bytes_per_block * options.num_blocks; }
  uint64_t total_bytes() const { return weights().memory_bytes + cache_bytes(); }

  // Blocks that fit beside the weights; 0 when none does.
  int64_t BlocksFor(uint64_t available_bytes) const;
  // A table to print, lines ending in '\n'.
  std::string ToString() const;
};

MemoryPlan MakeMemoryPlan(const ModelConfig& config, const MemoryPlanOptions& options);

// RESOURCE_EXHAUSTED, with what is needed, what for, and what is there.
absl::Status CheckFits(const MemoryPlan& plan, uint64_t available_bytes);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_MEMORY_PLAN_H_
