#ifndef LATENTD_SERVER_ENGINE_FACTORY_H_
#define LATENTD_SERVER_ENGINE_FACTORY_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/group_member.h"
#include "engine/model/cache_format.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "engine/step.h"

namespace latentd {

enum class EngineKind { kCpu, kCuda };

// "cpu", "cuda".
std::string_view EngineName(EngineKind kind);

// What `name` stands for here: "cpu", "cuda", or "auto", which is cuda where this program has the
// CUDA engine and the machine a Hopper GPU, else cpu. UNAVAILABLE for a cuda that this program was
// built without; whether there is a GPU is seen when the engine is made.
absl::StatusOr<EngineKind> ChooseEngine(std::string_view name);

// What an engine is made with. All counts >= 1 but where 0 is explained.
struct EngineSettings {
  EngineKind kind = EngineKind::kCpu;
  int32_t num_blocks = 0;  // KV cache blocks; 0 (cuda only): all that fit beside the rest
  int32_t max_step_tokens = 2048;
  int32_t max_sequences = 256;
  int32_t max_model_len = 0;          // 0: the model's limit, or what the cache holds
  int32_t threads = 0;                // cpu; 0: one per core
  int32_t device = 0;                 // cuda
  int32_t max_graph_sequences = 256;  // cuda; 0: no graphs
  bool batch_invariant = false;       // cuda; the CPU engine always is
  // kFp8: cuda holds the cache so, the CPU engine rounds its f32 one alike. Else it is bf16 or f32.
  CacheFormat cache_format = CacheFormat::kF32;
  // Which rank of a group it is: it loads that one's slice of the weights
  // (engine/model/placement.h).
  int32_t rank = 0;
  int32_t world_size = 1;
  // CPU ranks: where the others reach this one, "host:port". Port 0 is a free one; on all
  // interfaces its address() has no host, and whoever hands it on fills in how this host is called.
  std::string tensor_listen = "0.0.0.0:0";
  // CPU ranks: the end of a collective in which others do not come, for when nobody else ends it.
  absl::Duration call_timeout = absl::Minutes(5);
};

// The memory that an engine takes.
struct EngineMemory {
  std::string table;       // to print, lines ending in '\n'; may be empty when it does not fit
  int32_t num_blocks = 0;  // of the settings, or all that fit
  absl::Status fits;       // RESOURCE_EXHAUSTED, with the numbers
};

// From the config alone, before anything is allocated. `available_bytes`: what the machine has
// left, or for the CUDA engine what the GPU has free. INVALID_ARGUMENT for a setting out of range.
absl::StatusOr<EngineMemory> PlanEngineMemory(const ModelConfig& model,
                                              const EngineSettings& settings,
                                              uint64_t available_bytes);

// What a kv_cache_dtype stands for: "auto", "fp8", and "bf16" of the CUDA engine. INVALID_ARGUMENT
// for others.
absl::StatusOr<CacheFormat> ChooseCacheFormat(std::string_view name, EngineKind kind);

// Bytes of one block of the KV cache.
uint64_t CacheBytesPerBlock(const ModelConfig& model, EngineKind kind, CacheFormat format);

// Told how loading goes, by the loading thread.
class LoadListener {
 public:
  virtual ~LoadListener() = default;
  // A phase begins: config, tokenizer, weights, engine, warmup.
  virtual void OnPhase(std::string_view phase) = 0;
  // Before the weights are read. `table`: lines ending in '\n'.
  virtual void OnPlan(const std::string& table) = 0;
  virtual void OnProgress(uint64_t loaded_bytes, uint64_t total_bytes) = 0;
  // Nothing moves, and nothing is wrong: it waits for other machines.
  virtual void OnWaiting() {}
};

// Loads the weights of `dir` and makes the engine. RESOURCE_EXHAUSTED, before anything is read,
// when it does not fit; UNAVAILABLE without a driver or a Hopper GPU.
absl::StatusOr<std::unique_ptr<Engine>> MakeEngine(const ModelConfig& model,
                                                   const std::filesystem::path& dir,
                                                   LoadFormat format,
                                                   const EngineSettings& settings,
                                                   LoadListener* listener);

// The same for a rank of a group, that of the settings, which may have one rank. It is in no group
// yet: GroupMember::Join().
absl::StatusOr<std::unique_ptr<GroupMember>> MakeGroupMember(const ModelConfig& model,
                                                             const std::filesystem::path& dir,
                                                             LoadFormat format,
                                                             const EngineSettings& settings,
                                                             LoadListener* listener);

// Where a step's time went, in the order of first use; made by running it once more with
// timestamps. Empty for engines that cannot tell.
struct KernelFamily {
  std::string name;
  double seconds = 0;
  int num_kernels = 0;
};
absl::StatusOr<std::vector<KernelFamily>> ProfileStep(Engine* engine, const StepPlan& plan);

}  // namespace latentd

#endif  // LATENTD_SERVER_ENGINE_FACTORY_H_
