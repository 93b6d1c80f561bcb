#include "engine/model/generation_config.h"

#include <limits>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/model/json.h"
#include "engine/model/json_fields.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr char kFile[] = "generation_config.json";
constexpr size_t kMaxBytes = 1 << 20;
constexpr int32_t kMaxInt = std::numeric_limits<int32_t>::max();
constexpr double kSmallest = std::numeric_limits<float>::min();  // for ranges that leave out 0

// How Transformers runs, caches, reports or speculates; the tokens are the same.
constexpr const char* kInertFields[] = {
    "_from_model_config",
    "assistant_confidence_threshold",
    "assistant_early_exit",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "cache_config",
    "cache_implementation",
    "compile_config",
    "continuous_batching_config",
    "decoder_start_token_id",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "length_penalty",
    "low_memory",
    "max_cache_len",
    "max_length",
    "max_matching_ngram_size",
    "max_time",
    "min_length",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "remove_invalid_values",
    "renormalize_logits",
    "return_dict_in_generate",
    "speculation_type",
    "target_lookbehind",
    "token_healing",
    "transformers_version",
    "use_cache",
    "use_mtp",
};

// What would change the tokens: only the value that switches it off (JSON) will do.
struct FixedField {
  const char* name;
  const char* off;
};
constexpr FixedField kFixedFields[] = {
    {"num_beams", "1"},
    {"num_beam_groups", "1"},
    {"num_return_sequences", "1"},
    {"diversity_penalty", "0.0"},
    {"penalty_alpha", "null"},
    {"dola_layers", "null"},
    {"typical_p", "1.0"},
    {"top_h", "null"},
    {"epsilon_cutoff", "0.0"},
    {"eta_cutoff", "0.0"},
    {"encoder_repetition_penalty", "1.0"},
    {"no_repeat_ngram_size", "0"},
    {"encoder_no_repeat_ngram_size", "0"},
    {"bad_words_ids", "null"},
    {"constraints", "null"},
    {"force_words_ids", "null"},
    {"forced_bos_token_id", "null"},
    {"forced_eos_token_id", "null"},
    {"suppress_tokens", "null"},
    {"begin_suppress_tokens", "null"},
    {"sequence_bias", "null"},
    {"exponential_decay_length_penalty", "null"},
    {"guidance_scale", "1.0"},
    {"watermarking_config", "null"},
    {"stop_strings", "null"},
};

}  // namespace

absl::StatusOr<GenerationConfig> ParseGenerationConfig(std::string_view json, int32_t vocab_size) {
  ASSIGN_OR_RETURN(const nlohmann::json object, ParseJsonObject(json, kFile));
  JsonFields fields(object, kFile);
  GenerationConfig config;
  fields.OptionalFloat("temperature", 0, 2, &config.temperature);
  fields.OptionalFloat("top_p", kSmallest, 1, &config.top_p);
  fields.OptionalInt("top_k", -1, kMaxInt, &config.top_k);
  fields.OptionalFloat("min_p", 0, 1, &config.min_p);
  fields.OptionalFloat("repetition_penalty", kSmallest, 2, &config.repetition_penalty);
  fields.OptionalInt("max_new_tokens", 1, kMaxInt, &config.max_new_tokens);
  fields.OptionalInt("min_new_tokens", 0, kMaxInt, &config.min_new_tokens);
  fields.OptionalInt("bos_token_id", 0, vocab_size - 1, &config.bos_token_id);
  fields.Ints("eos_token_id", 0, vocab_size - 1, &config.eos_token_ids);
  std::optional<bool> do_sample;
  fields.OptionalBool("do_sample", &do_sample);
  for (const char* name : kInertFields) fields.Ignore(name);
  for (const FixedField& field : kFixedFields) {
    fields.Only(field.name, nlohmann::json::parse(field.off));
  }
  RETURN_IF_ERROR(fields.status());
  if (config.top_k == -1) config.top_k = 0;
  if (do_sample == false) config.temperature = 0.0f;
  config.unknown_fields = fields.UnknownFields();
  return config;
}

absl::StatusOr<GenerationConfig> LoadGenerationConfig(const std::filesystem::path& dir,
                                                      int32_t vocab_size) {
  const absl::StatusOr<std::string> text = ReadTextFile(dir / kFile, kMaxBytes);
  if (absl::IsNotFound(text.status())) return GenerationConfig{};
  RETURN_IF_ERROR(text.status());
  absl::StatusOr<GenerationConfig> config = ParseGenerationConfig(*text, vocab_size);
  if (!config.ok()) {
    return absl::Status(config.status().code(),
                        absl::StrCat((dir / "").string(), config.status().message()));
  }
  return config;
}

}  // namespace latentd
