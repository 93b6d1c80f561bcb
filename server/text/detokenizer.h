#ifndef LATENTD_SERVER_TEXT_DETOKENIZER_H_
#define LATENTD_SERVER_TEXT_DETOKENIZER_H_

#include <memory>
#include <string>
#include <string_view>

#include "server/text/tokenizer.h"

namespace latentd {

// Turns one sequence's tokens into text as they come: never half a character, O(1) a token. The
// pieces and the flush together are exactly Tokenizer::Decode() of all tokens. Not thread-safe.
class Detokenizer {
 public:
  Detokenizer(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special_tokens);

  // The text that `token` completes; possibly empty.
  std::string Push(int32_t token);
  // What is left: U+FFFD for the beginning of a character that never ended.
  std::string Flush();

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_tokens_;
  std::string pending_;  // an incomplete character, at most 3 bytes
};

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_DETOKENIZER_H_
