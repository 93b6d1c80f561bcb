#include "server/text/detokenizer.h"

#include <utility>

#include "server/text/utf8.h"

namespace latentd {

Detokenizer::Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens)
    : tokenizer_(std::move(tokenizer)), skip_special_tokens_(skip_special_tokens) {}

std::string Detokenizer::Push(int32_t token) {
  std::string text;
  if (skip_special_tokens_ && tokenizer_->IsSpecial(token)) return text;
  pending_ += tokenizer_->TokenBytes(token);
  TakeUtf8(pending_, /*at_end=*/false, text);
  return text;
}

std::string Detokenizer::Flush() {
  std::string text;
  TakeUtf8(pending_, /*at_end=*/true, text);
  return text;
}

}  // namespace latentd
