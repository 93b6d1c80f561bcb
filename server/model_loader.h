#ifndef LATENTD_SERVER_MODEL_LOADER_H_
#define LATENTD_SERVER_MODEL_LOADER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/model/config.h"
#include "engine/model/memory_plan.h"
#include "engine/model/weights.h"
#include "server/config.h"
#include "server/served_model.h"

namespace latentd {

// Where a model lies: `model` of the configuration, or the demo model.
struct ModelPath {
  std::filesystem::path dir;  // tokenizer.json, *.safetensors
  std::filesystem::path
      config_file;   // config.json, or the .json file that was given instead of a directory
  std::string name;  // what requests may call it
  std::filesystem::path demo_dir;  // the demo model, for its tokenizer; empty: not found

  // NOT_FOUND with the path when there is none.
  static absl::StatusOr<ModelPath> Resolve(const ServeConfig& config,
                                           const std::filesystem::path& executable);
};

// What the engine is made with, from the configuration and the model together.
struct EngineLimits {
  MemoryPlan memory;
  int32_t num_blocks = 0;
  int32_t max_model_len = 0;
  int32_t max_step_tokens = 0;
  int32_t max_sequences = 0;
};

absl::StatusOr<ModelConfig> ReadModelConfig(const ModelPath& path);
// INVALID_ARGUMENT names the key whose value the model does not allow.
absl::StatusOr<EngineLimits> ResolveLimits(const ServeConfig& config, const ModelConfig& model);
// generation_config.json of `dir`; what it leaves out, or all if there is none, is `model`'s.
absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::filesystem::path& dir,
                                                          const ModelConfig& model);

// Fills in tokenizer and chat template.
absl::Status LoadText(const ServeConfig& config, const ModelPath& path, const ModelConfig& model,
                      ServedModel* served);

// Told how loading goes, by the loading thread.
class LoadListener {
 public:
  virtual ~LoadListener() = default;
  // A phase begins: config, tokenizer, weights, engine, warmup.
  virtual void OnPhase(std::string_view phase) = 0;
  virtual void OnProgress(uint64_t loaded_bytes, uint64_t total_bytes) = 0;
  // Before the weights are read.
  virtual void OnPlan(const EngineLimits& limits) = 0;
};

struct LoadedModel {
  std::shared_ptr<const ServedModel> served;
  std::unique_ptr<Engine> engine;  // has computed one step already
};

// Loads all that serving needs. An error names the file or key and says what is wrong. Takes
// minutes for a large model and cannot be interrupted.
absl::StatusOr<LoadedModel> LoadModel(const ServeConfig& config, const ModelPath& path,
                                      LoadListener* listener);

}  // namespace latentd

#endif  // LATENTD_SERVER_MODEL_LOADER_H_
