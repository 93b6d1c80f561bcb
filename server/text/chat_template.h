#ifndef LATENTD_SERVER_TEXT_CHAT_TEMPLATE_H_
#define LATENTD_SERVER_TEXT_CHAT_TEMPLATE_H_

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "server/text/tokenizer.h"

namespace latentd {

// A conversation in the form that Hugging Face chat templates expect.
struct ChatInput {
  nlohmann::ordered_json messages;  // array of {role, content, tool_calls?, ...}; key order is kept
  nlohmann::ordered_json tools;     // array of {type: function, function: {...}}; null: none
  nlohmann::ordered_json
      kwargs;  // object of further template variables (thinking, ...); null: none
  bool add_generation_prompt = true;
  bool continue_final_message =
      false;  // go on with the last message; excludes add_generation_prompt
  // Let the text of messages, tools and kwargs spell control tokens, as Transformers does. Without
  // it such text stays text: a user cannot forge a turn.
  bool parse_control_tokens = false;
};

struct RenderedChat {
  std::string text;
  std::vector<int32_t> tokens;
};

// A compiled Jinja chat template and the tokenizer that encodes what it renders. Immutable; any
// thread.
class ChatTemplate {
 public:
  // INVALID_ARGUMENT with the template's line when it does not compile.
  static absl::StatusOr<std::shared_ptr<const ChatTemplate>> Compile(
      std::string_view source, std::shared_ptr<const Tokenizer> tokenizer);
  ~ChatTemplate();

  // INVALID_ARGUMENT with the template's own message (raise_exception), or the place of the error.
  // Bounded work: a hostile template or conversation runs out of fuel.
  absl::StatusOr<RenderedChat> Render(const ChatInput& input) const;

 private:
  struct Impl;
  explicit ChatTemplate(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_CHAT_TEMPLATE_H_
