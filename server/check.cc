#include "server/check.h"

#include <algorithm>
#include <filesystem>
#include <ostream>
#include <string>
#include <string_view>
#include <system_error>

#include "engine/model/host_memory.h"
#include "engine/model/memory_plan.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"
#include "engine/status.h"
#include "fmt/format.h"
#include "fmt/ostream.h"

namespace latentd {
namespace {

std::string DescribeModel(const ModelPath& path, const ModelConfig& model) {
  std::string text = fmt::format("model {} ({})\n", path.name, path.config_file.string());
  text += fmt::format(
      "layers: {}, of them {} dense, {} MTP beside them; hidden_size {}; vocab_size {}\n",
      model.num_hidden_layers, model.first_k_dense_replace, model.num_nextn_predict_layers,
      model.hidden_size, model.vocab_size);
  text += fmt::format("attention: {} heads, kv_lora_rank {}, qk_rope_head_dim {}, q_lora_rank {}\n",
                      model.num_attention_heads, model.kv_lora_rank, model.qk_rope_head_dim,
                      model.q_lora_rank ? std::to_string(*model.q_lora_rank) : "none");
  text += fmt::format("experts: {} routed in {} groups, {} a token; {} shared\n",
                      model.n_routed_experts, model.n_group, model.num_experts_per_tok,
                      model.n_shared_experts);
  text +=
      fmt::format("weights: {}\n", model.quantization ? fmt::format("FP8 e4m3 in blocks of {} x {}",
                                                                    model.quantization->block_rows,
                                                                    model.quantization->block_cols)
                                   : model.dtype_bytes == 4 ? "float32"
                                                            : "bfloat16");
  for (const std::string& field : model.unknown_fields) {
    text += fmt::format("note: config.json's '{}' means nothing to latentd\n", field);
  }
  return text;
}

double Gib(uint64_t bytes) { return static_cast<double>(bytes) / (1 << 30); }

// How a group holds the model, beside the plan of one of its ranks: what all of them hold alike,
// and what all together have.
std::string DescribeGroup(const ServeConfig& config, const ModelConfig& model,
                          const EngineSettings& engine, const EngineMemory& memory) {
  std::string text = fmt::format(
      "group: {} ranks on {} node{}, {} on each; a rank holds up to {} of {} routed experts, and "
      "all "
      "of the rest\n",
      config.world_size, config.num_nodes, config.num_nodes == 1 ? "" : "s", RanksPerNode(config),
      LocalExperts(model.n_routed_experts, 0, engine.world_size).count, model.n_routed_experts);
  const MemoryPlan plan = MakeMemoryPlan(model, {});
  const uint64_t vocabulary =
      plan.part(WeightPart::kEmbedding).memory_bytes + plan.part(WeightPart::kHead).memory_bytes;
  const uint64_t freed = vocabulary - vocabulary / config.world_size;
  const uint64_t token_bytes =
      CacheBytesPerBlock(model, engine.kind, engine.cache_format) / kBlockSize;
  text += fmt::format(
      "embedding and head: whole on every rank, {:.2f} GiB; dealt out over the ranks they would "
      "leave "
      "{:.2f} GiB, {} tokens of KV cache, more\n",
      Gib(vocabulary), Gib(freed), freed / token_bytes);
  if (memory.num_blocks > 0) {
    const int64_t tokens = int64_t{memory.num_blocks} * kBlockSize;
    text += fmt::format("KV cache: {} tokens on each rank, {} on all; a sequence lies on one\n",
                        tokens, tokens * config.world_size);
  }
  return text;
}

}  // namespace

absl::Status RunCheck(const ServeConfig& config, const ModelPath& path, uint64_t gpu_memory_bytes,
                      std::ostream& out) {
  ASSIGN_OR_RETURN(const ModelConfig model, ReadModelConfig(path));
  fmt::print(out, "{}\n", DescribeModel(path, model));
  ASSIGN_OR_RETURN(EngineSettings engine, ResolveEngine(config, model));
  // That of rank 0: where experts cannot be dealt out evenly, the first ranks hold one more.
  engine.world_size = static_cast<int32_t>(config.world_size);
  const bool gpu = engine.kind == EngineKind::kCuda;
  // A node's CPU ranks share its memory; GPUs have their own.
  const uint64_t available = gpu ? gpu_memory_bytes : AvailableMemoryBytes() / RanksPerNode(config);
  ASSIGN_OR_RETURN(const EngineMemory memory, PlanEngineMemory(model, engine, available));
  fmt::print(out, "engine: {}{}\n{}", EngineName(engine.kind),
             config.world_size > 1 ? ", each rank:" : "", memory.table);
  if (config.world_size > 1) fmt::print(out, "{}", DescribeGroup(config, model, engine, memory));
  if (memory.num_blocks > 0) {
    const int64_t cache_tokens = int64_t{memory.num_blocks} * kBlockSize;
    fmt::print(out, "max_model_len: {} tokens\n",
               engine.max_model_len > 0
                   ? engine.max_model_len
                   : std::min<int64_t>(model.max_position_embeddings, cache_tokens));
  }
  fmt::print(out, "\n");
  ASSIGN_OR_RETURN(const GenerationDefaults defaults, LoadGenerationDefaults(path.dir, model));

  std::error_code code;
  const bool lone_config = path.config_file.filename() != "config.json" ||
                           !std::filesystem::exists(path.dir / "tokenizer.json", code);
  if (lone_config) {
    fmt::print(out, "tokenizer: not checked, {} stands alone\n", path.config_file.string());
  } else {
    ServedModel text;
    RETURN_IF_ERROR(LoadText(config, path, model, &text));
    fmt::print(out, "tokenizer: {} tokens; chat template: {}\n", text.tokenizer->vocab_size(),
               text.chat_template == nullptr ? "none, Chat will be refused" : "ok");
  }
  if (lone_config || config.load_format == "dummy") {
    fmt::print(out, "checkpoint: not checked, {}\n",
               config.load_format == "dummy" ? "load_format is dummy" : "there is none");
  } else {
    RETURN_IF_ERROR(CheckWeights(model, path.dir));
    fmt::print(out, "checkpoint: every tensor is there, none is surplus, shapes and types fit\n");
  }
  const std::string_view where = gpu                        ? "such a GPU"
                                 : RanksPerNode(config) > 1 ? "a rank's share of this machine"
                                                            : "this machine";
  if (memory.fits.ok()) {
    fmt::print(out, "memory: fits into the {:.1f} GiB that {} has left\n", Gib(available), where);
  } else if (lone_config) {  // it is being planned for another machine
    fmt::print(out, "memory: not on {}: {}\n", where, std::string(memory.fits.message()));
  } else {
    return memory.fits;
  }
  return absl::OkStatus();
}

}  // namespace latentd
