#ifndef LATENTD_ENGINE_MODEL_GENERATION_CONFIG_H_
#define LATENTD_ENGINE_MODEL_GENERATION_CONFIG_H_

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace latentd {

// A checkpoint's generation_config.json: what a request gets that does not say otherwise. A field
// that the file does not have is nullopt; the names and ranges are those of the API.
struct GenerationConfig {
  std::optional<float> temperature;         // [0, 2]; 0 when do_sample is false
  std::optional<float> top_p;               // (0, 1]
  std::optional<int32_t> top_k;             // >= 0; 0 (in the file also -1): no limit
  std::optional<float> min_p;               // [0, 1]
  std::optional<float> repetition_penalty;  // (0, 2]; 1: none
  std::optional<int32_t> max_new_tokens;    // >= 1
  std::optional<int32_t> min_new_tokens;    // >= 0
  std::optional<int32_t> bos_token_id;
  std::vector<int32_t> eos_token_ids;       // empty: config.json's
  std::vector<std::string> unknown_fields;  // mean nothing to this program: worth a line in the log
};

// INVALID_ARGUMENT names the field, its value and what is supported. `vocab_size` bounds the token
// ids. Fields that ask for another way of decoding (num_beams > 1, penalty_alpha, ...) are refused.
absl::StatusOr<GenerationConfig> ParseGenerationConfig(std::string_view json, int32_t vocab_size);

// The same from `dir`/generation_config.json. A checkpoint without that file has no defaults:
// empty.
absl::StatusOr<GenerationConfig> LoadGenerationConfig(const std::filesystem::path& dir,
                                                      int32_t vocab_size);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_GENERATION_CONFIG_H_
