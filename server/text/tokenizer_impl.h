#ifndef LATENTD_SERVER_TEXT_TOKENIZER_IMPL_H_
#define LATENTD_SERVER_TEXT_TOKENIZER_IMPL_H_

#include <string>

#include "nlohmann/json.hpp"
#include "server/text/rust_ffi.h"
#include "server/text/tokenizer.h"

namespace latentd {

struct Tokenizer::Impl {
  ~Impl() { latentd_tokenizer_free(handle); }

  LatentdTokenizer* handle = nullptr;
  LatentdTables tables{};
  std::string bos_token;
  std::string eos_token;
  std::string chat_template;
  nlohmann::ordered_json special_tokens;  // {bos_token: "...", ...}: what templates may name
};

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_TOKENIZER_IMPL_H_
