#ifndef LATENTD_SERVER_TEXT_TOKENIZER_H_
#define LATENTD_SERVER_TEXT_TOKENIZER_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace latentd {

// A Hugging Face tokenizer.json. Immutable after Load(): any number of threads may use it.
class Tokenizer {
 public:
  // Reads `dir`/tokenizer.json, and from tokenizer_config.json the names of the begin and end
  // tokens.
  static absl::StatusOr<std::shared_ptr<const Tokenizer>> Load(const std::filesystem::path& dir);
  ~Tokenizer();

  // 1 + the largest id.
  int32_t vocab_size() const;

  // `text` as token ids; adds no begin token. INVALID_ARGUMENT unless it is UTF-8.
  // With `parse_control_tokens` the spelling of an added token (<｜User｜>) becomes that token, as
  // in Transformers; without, text can never yield one.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              bool parse_control_tokens) const;

  // Text of `ids`; bytes that are no UTF-8 become U+FFFD. Ids without a token are nothing.
  std::string Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const;

  // The bytes that a token stands for; empty for ids without one.
  std::string_view TokenBytes(int32_t id) const;
  bool IsSpecial(int32_t id) const;  // `special: true` in tokenizer.json
  bool IsAdded(int32_t id) const;    // a control token of any kind
  std::optional<int32_t> TokenId(std::string_view token) const;

  const std::string& bos_token() const;  // empty if there is none
  const std::string& eos_token() const;

  // The chat_template of tokenizer_config.json or chat_template.jinja; empty if there is none.
  const std::string& chat_template() const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  friend class ChatTemplate;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_TOKENIZER_H_
