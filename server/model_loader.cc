#include "server/model_loader.h"

#include <algorithm>
#include <fstream>
#include <limits>
#include <sstream>
#include <system_error>
#include <utility>

#include "engine/model/generation_config.h"
#include "engine/status.h"
#include "fmt/format.h"
#include "server/cluster/rank_command.h"
#include "server/cluster/remote_engine.h"
#include "server/fingerprint.h"
#include "server/log.h"
#include "server/version.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;

// The one architecture that ParseModelConfig() accepts.
constexpr char kArchitecture[] = "DeepseekV3ForCausalLM";
constexpr int64_t kDefaultCpuCacheBytes = int64_t{1} << 30;
constexpr uintmax_t kMaxTextFileBytes = uintmax_t{16} << 20;

absl::StatusOr<std::string> ReadTextFile(const fs::path& path) {
  std::error_code code;
  const uintmax_t size = fs::file_size(path, code);
  if (code) return absl::NotFoundError(fmt::format("{}: {}", path.string(), code.message()));
  if (size > kMaxTextFileBytes) {
    return absl::InvalidArgumentError(fmt::format("{} has {} bytes; at most {} are read",
                                                  path.string(), size, kMaxTextFileBytes));
  }
  std::string text(size, '\0');
  std::ifstream stream(path, std::ios::binary);
  if (!stream.read(text.data(), static_cast<std::streamsize>(size))) {
    return absl::InvalidArgumentError(fmt::format("{} cannot be read", path.string()));
  }
  return text;
}

absl::Status Prefixed(std::string_view prefix, const absl::Status& status) {
  return absl::Status(status.code(), fmt::format("{}{}", prefix, std::string(status.message())));
}

// Where random weights are served from a lone config.json, any tokenizer does whose ids fit.
absl::StatusOr<std::shared_ptr<const Tokenizer>> LoadTokenizer(const ServeConfig& config,
                                                               const ModelPath& path,
                                                               const ModelConfig& model) {
  fs::path dir = path.dir;
  std::error_code code;
  if (config.load_format == "dummy" && !fs::exists(dir / "tokenizer.json", code) &&
      !path.demo_dir.empty()) {
    dir = path.demo_dir;
    LogEvent(spdlog::level::warn, "the model has no tokenizer; using another one",
             {{"model", path.dir.string()}, {"tokenizer", dir.string()}});
  }
  ASSIGN_OR_RETURN(std::shared_ptr<const Tokenizer> tokenizer, Tokenizer::Load(dir));
  if (tokenizer->vocab_size() > model.vocab_size) {
    return absl::InvalidArgumentError(fmt::format(
        "{}: token ids reach {}, but config.json's vocab_size is {}",
        (dir / "tokenizer.json").string(), tokenizer->vocab_size() - 1, model.vocab_size));
  }
  return tokenizer;
}

// Null when the model has none.
absl::StatusOr<std::shared_ptr<const ChatTemplate>> LoadChatTemplate(
    const ServeConfig& config, const std::shared_ptr<const Tokenizer>& tokenizer) {
  std::string source = tokenizer->chat_template();
  std::string origin = "the model's chat template";
  if (!config.chat_template.empty()) {
    ASSIGN_OR_RETURN(source, ReadTextFile(config.chat_template));
    origin = "chat_template " + config.chat_template;
  }
  if (source.empty()) return nullptr;
  auto compiled = ChatTemplate::Compile(source, tokenizer);
  if (!compiled.ok()) return Prefixed(origin + ": ", compiled.status());
  return compiled;
}

// Computes a few tokens and draws one, so that the first request does not pay for what is lazy, and
// an engine that cannot compute is known before it is asked. The cache is not used by anybody yet.
absl::Status WarmUp(Engine* engine) {
  const EngineInfo info = engine->info();
  const int32_t num_prompt =
      std::min({kBlockSize - 1, info.max_step_tokens, std::max(1, info.max_model_len - 1)});
  int32_t num_computed = 0;
  for (int32_t num_tokens : {num_prompt, 1}) {
    if (num_computed + num_tokens > info.max_model_len) break;
    StepPlan plan;
    plan.step = num_computed == 0 ? 0 : 1;
    plan.sequences = {{.num_computed_tokens = num_computed,
                       .num_tokens = num_tokens,
                       .num_blocks = 1,
                       .sample = true,
                       .sampling = {.temperature = 0}}};
    plan.tokens.assign(num_tokens, 0);
    plan.blocks = {0};
    ASSIGN_OR_RETURN(const StepResult result, engine->Execute(plan));
    if (result.sampled.size() != 1 || result.sampled[0] < 0 ||
        result.sampled[0] >= info.vocab_size) {
      return absl::InternalError("the engine's first step drew no token of the vocabulary");
    }
    num_computed += num_tokens;
  }
  return absl::OkStatus();
}

// The same of a group, which may lose a rank meanwhile.
absl::Status WarmUp(Engine* engine, Cluster* cluster) {
  constexpr int kTries = 10;
  absl::Status status;
  for (int i = 0; i < kTries; ++i) {
    status = WarmUp(engine);
    if (!absl::IsAborted(status)) return status;
    RETURN_IF_ERROR(cluster->leader()->AwaitGroup(absl::Minutes(1)).status());
  }
  return status;
}

absl::StatusOr<std::unique_ptr<Cluster>> StartCluster(const ServeConfig& config,
                                                      const ModelPath& path,
                                                      LoadListener* listener) {
  ClusterOptions options;
  options.listen = ClusterListenAddress(config);
  options.world_size = static_cast<int32_t>(config.world_size);
  options.num_nodes = static_cast<int32_t>(config.num_nodes);
  options.version = kVersion;
  options.step_deadline = config.step_deadline;
  options.form_timeout = config.group_timeout;
  ASSIGN_OR_RETURN(options.config_hash, ConfigHash(config, path));
  ASSIGN_OR_RETURN(options.checkpoint_hash, CheckpointHash(config, path));
  listener->OnPhase("weights");
  return Cluster::Start(
      options,
      [config, listen = options.listen](int port, int32_t rank) {
        return RankCommand(config,
                           config.leader.empty() ? DialAddress(listen, port) : config.leader, rank);
      },
      listener);
}

}  // namespace

absl::StatusOr<ModelPath> ModelPath::Resolve(const ServeConfig& config,
                                             const fs::path& executable) {
  ModelPath path;
  const absl::StatusOr<fs::path> demo = FindDemoModel(executable);
  if (demo.ok()) path.demo_dir = *demo;
  if (config.model.empty()) {
    RETURN_IF_ERROR(demo.status());
    path.dir = *demo;
  } else {
    path.dir = config.model;
  }
  std::error_code code;
  const fs::file_status status = fs::status(path.dir, code);
  if (!fs::exists(status)) {
    return absl::NotFoundError(fmt::format("model is '{}'; there is no such directory{}",
                                           path.dir.string(),
                                           code ? " (" + code.message() + ")" : ""));
  }
  if (fs::is_directory(status)) {
    path.config_file = path.dir / "config.json";
    if (!fs::exists(path.config_file, code)) {
      return absl::NotFoundError(
          fmt::format("model is '{}'; it has no config.json", path.dir.string()));
    }
  } else {
    path.config_file = path.dir;
    path.dir = path.config_file.parent_path();
  }
  path.name = config.served_model_name;
  if (path.name.empty()) {
    const fs::path full = fs::weakly_canonical(
        fs::is_directory(status) ? path.dir
                                 : path.config_file.parent_path() / path.config_file.stem(),
        code);
    path.name = full.filename().string();
    if (path.name.empty()) path.name = "model";
  }
  return path;
}

absl::StatusOr<ModelConfig> ReadModelConfig(const ModelPath& path) {
  ASSIGN_OR_RETURN(const std::string json, ReadTextFile(path.config_file));
  auto config = ParseModelConfig(json);
  if (!config.ok()) return Prefixed(path.config_file.string() + ": ", config.status());
  return config;
}

absl::StatusOr<EngineSettings> ResolveEngine(const ServeConfig& config, const ModelConfig& model) {
  ASSIGN_OR_RETURN(const EngineKind kind, ChooseEngine(config.engine));
  if (config.max_model_len > model.max_position_embeddings) {
    return absl::InvalidArgumentError(
        fmt::format("max_model_len is {}; the model's max_position_embeddings is {}",
                    config.max_model_len, model.max_position_embeddings));
  }
  ASSIGN_OR_RETURN(const CacheFormat cache_format, ChooseCacheFormat(config.kv_cache_dtype, kind));
  EngineSettings settings{
      .kind = kind,
      .max_step_tokens = static_cast<int32_t>(config.max_step_tokens),
      .max_sequences = static_cast<int32_t>(config.max_running),
      .max_model_len = static_cast<int32_t>(config.max_model_len),
      .threads = static_cast<int32_t>(config.threads),
      .device = static_cast<int32_t>(config.device),
      .max_graph_sequences = static_cast<int32_t>(config.max_graph_sequences),
      .batch_invariant = config.batch_invariant,
      .cache_format = cache_format,
  };
  int64_t memory = config.kv_cache_memory;
  if (config.kv_cache_tokens == 0 && memory == 0) {
    if (kind == EngineKind::kCuda) return settings;  // all that fit
    memory = kDefaultCpuCacheBytes;
  }
  const auto block_bytes = static_cast<int64_t>(CacheBytesPerBlock(model, kind, cache_format));
  const int64_t blocks = config.kv_cache_tokens > 0
                             ? (config.kv_cache_tokens + kBlockSize - 1) / kBlockSize
                             : memory / block_bytes;
  if (blocks < 1) {
    return absl::InvalidArgumentError(
        fmt::format("kv_cache_memory is {} bytes; one block of {} tokens takes {}", memory,
                    kBlockSize, block_bytes));
  }
  if (blocks > std::numeric_limits<int32_t>::max()) {
    return absl::InvalidArgumentError(
        fmt::format("the KV cache would have {} blocks; at most {} are "
                    "possible, lower kv_cache_memory",
                    blocks, std::numeric_limits<int32_t>::max()));
  }
  settings.num_blocks = static_cast<int32_t>(blocks);
  const int64_t cache_tokens = blocks * kBlockSize;
  if (config.max_model_len > cache_tokens) {
    return absl::InvalidArgumentError(fmt::format(
        "max_model_len is {}; the KV cache holds {} tokens: raise kv_cache_memory to {} bytes",
        config.max_model_len, cache_tokens,
        (config.max_model_len + kBlockSize - 1) / kBlockSize * block_bytes));
  }
  if (settings.max_model_len == 0) {
    settings.max_model_len =
        static_cast<int32_t>(std::min<int64_t>(model.max_position_embeddings, cache_tokens));
  }
  return settings;
}

absl::StatusOr<GenerationDefaults> LoadGenerationDefaults(const fs::path& dir,
                                                          const ModelConfig& model) {
  ASSIGN_OR_RETURN(const GenerationConfig config, LoadGenerationConfig(dir, model.vocab_size));
  if (config.repetition_penalty.value_or(1) != 1) {
    LogEvent(spdlog::level::warn, "generation_config.json: repetition_penalty has no effect",
             {{"repetition_penalty", static_cast<double>(*config.repetition_penalty)}});
  }
  GenerationDefaults defaults;
  defaults.temperature = config.temperature;
  defaults.top_p = config.top_p;
  defaults.min_p = config.min_p;
  defaults.eos_token_ids = config.eos_token_ids;
  if (config.top_k.value_or(0) > 0) defaults.top_k = config.top_k;
  if (defaults.eos_token_ids.empty()) defaults.eos_token_ids = model.eos_token_ids;
  return defaults;
}

absl::Status LoadText(const ServeConfig& config, const ModelPath& path, const ModelConfig& model,
                      ServedModel* served) {
  ASSIGN_OR_RETURN(served->tokenizer, LoadTokenizer(config, path, model));
  ASSIGN_OR_RETURN(served->chat_template, LoadChatTemplate(config, served->tokenizer));
  return absl::OkStatus();
}

absl::StatusOr<LoadedModel> LoadModel(const ServeConfig& config, const ModelPath& path,
                                      LoadListener* listener) {
  listener->OnPhase("config");
  ASSIGN_OR_RETURN(const ModelConfig model, ReadModelConfig(path));
  ASSIGN_OR_RETURN(const EngineSettings settings, ResolveEngine(config, model));
  auto served = std::make_shared<ServedModel>();
  served->name = path.name;
  served->architecture = kArchitecture;
  served->vocab_size = model.vocab_size;
  ASSIGN_OR_RETURN(served->defaults, LoadGenerationDefaults(path.dir, model));

  listener->OnPhase("tokenizer");
  RETURN_IF_ERROR(LoadText(config, path, model, served.get()));

  const LoadFormat format =
      config.load_format == "dummy" ? LoadFormat::kDummy : LoadFormat::kSafetensors;
  LoadedModel loaded{
      .served = nullptr, .cluster = nullptr, .engine = nullptr, .engine_kind = settings.kind};
  if (HasRankProcesses(config)) {
    ASSIGN_OR_RETURN(loaded.cluster, StartCluster(config, path, listener));
    loaded.engine = std::make_unique<RemoteEngine>(loaded.cluster->leader());
  } else {
    ASSIGN_OR_RETURN(loaded.engine, MakeEngine(model, path.dir, format, settings, listener));
  }
  ASSIGN_OR_RETURN(served->weights_hash, CheckpointHash(config, path));
  const EngineInfo info = loaded.engine->info();
  served->max_model_len = info.max_model_len;
  served->kv_cache_tokens = int64_t{info.num_blocks} * kBlockSize * info.num_dp_ranks;
  loaded.served = std::move(served);

  listener->OnPhase("warmup");
  RETURN_IF_ERROR(loaded.cluster == nullptr ? WarmUp(loaded.engine.get())
                                            : WarmUp(loaded.engine.get(), loaded.cluster.get()));
  return loaded;
}

}  // namespace latentd
