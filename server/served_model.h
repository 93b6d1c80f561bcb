#ifndef LATENTD_SERVER_SERVED_MODEL_H_
#define LATENTD_SERVER_SERVED_MODEL_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "server/text/chat_template.h"
#include "server/text/tokenizer.h"

namespace latentd {

// What a request that sets nothing is generated with: the model's generation_config.json.
struct GenerationDefaults {
  std::optional<float> temperature;
  std::optional<float> top_p;
  std::optional<int32_t> top_k;
  std::optional<float> min_p;
  std::vector<int32_t> eos_token_ids;  // end an answer unless the request ignores them
};

// A loaded model as the service sees it. Immutable once served.
struct ServedModel {
  std::string name;             // what requests call it
  std::string architecture;     // config.json: architectures[0]
  std::string weights_hash;     // hexadecimal; empty when the weights are random
  int32_t max_model_len = 0;    // prompt + completion, tokens
  int32_t vocab_size = 0;       // of the model, config.json; token ids are below it
  int64_t kv_cache_tokens = 0;  // all replicas together
  GenerationDefaults defaults;
  std::shared_ptr<const Tokenizer> tokenizer;
  std::shared_ptr<const ChatTemplate> chat_template;  // null: the model has none, Chat is refused
};

}  // namespace latentd

#endif  // LATENTD_SERVER_SERVED_MODEL_H_
