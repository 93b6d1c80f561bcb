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
#include "server/cluster/cluster.h"
#include "server/config.h"
#include "server/engine_factory.h"
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

absl::StatusOr<ModelConfig> ReadModelConfig(const ModelPath& path);
// What the engine is made with, from the configuration and the model together. INVALID_ARGUMENT
// names the key whose value the model does not allow.
absl::StatusOr<EngineSettings> ResolveEngine(const ServeConfig& config, const ModelConfig& model);
// generation_config.json of `dir`; what it leaves out, or all if there is none, is `model`'s.
absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const std::filesystem::path& dir,
                                                          const ModelConfig& model);

// Fills in tokenizer and chat template.
absl::Status LoadText(const ServeConfig& config, const ModelPath& path, const ModelConfig& model,
                      ServedModel* served);

struct LoadedModel {
  std::shared_ptr<const ServedModel> served;
  std::unique_ptr<Cluster> cluster;  // the ranks that the engine is made of; null: in this process
  std::unique_ptr<Engine> engine;    // has computed one step already
  EngineKind engine_kind = EngineKind::kCpu;
};

// Loads all that serving needs. An error names the file or key and says what is wrong. Takes
// minutes for a large model and cannot be interrupted.
absl::StatusOr<LoadedModel> LoadModel(const ServeConfig& config, const ModelPath& path,
                                      LoadListener* listener);

}  // namespace latentd

#endif  // LATENTD_SERVER_MODEL_LOADER_H_
