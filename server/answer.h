#ifndef LATENTD_SERVER_ANSWER_H_
#define LATENTD_SERVER_ANSWER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/step.h"
#include "scheduler/request.h"
#include "server/text/detokenizer.h"
#include "server/text/reasoning_parser.h"
#include "server/text/stop_matcher.h"
#include "server/text/tokenizer.h"

namespace latentd {

// How an answer's tokens become its text.
struct AnswerSpec {
  std::shared_ptr<const Tokenizer> tokenizer;
  bool skip_special_tokens = true;
  std::vector<std::string> stop;  // none empty
  // Keep the stop string, or the text of a token of `shown_stop_tokens`, in the text.
  bool include_stop = false;
  std::vector<TokenId> shown_stop_tokens;  // the request's own, not the model's end tokens
  int32_t min_tokens = 0;  // stop strings are looked for in the text after that many
  // Split at <think> and </think>; the state at the start is that of the prompt's end.
  bool split_reasoning = false;
  std::string prompt_tail;
};

// What one token added.
struct AnswerPiece {
  std::string reasoning;  // comes before `content`
  std::string content;
  bool finished = false;  // the answer has ended, by this token or by a stop string
};

// One answer's way from tokens to text: detokenise, look for stop strings, split off the reasoning.
// Not thread-safe.
class Answer {
 public:
  explicit Answer(AnswerSpec spec);

  // REQUIRES: the answer has not finished. `finish` is what the core says of the token.
  AnswerPiece Push(TokenId token, FinishReason finish);

  int32_t completion_tokens() const { return completion_tokens_; }
  int32_t reasoning_tokens() const { return reasoning_tokens_; }

  // Once finished:
  FinishReason finish_reason() const { return finish_reason_; }
  // The stop string that ended it, or the text of the token that did; else empty.
  const std::string& stop_matched() const { return stop_matched_; }
  // The token that ended it, unless a stop string or the length did.
  std::optional<TokenId> stop_token_id() const { return stop_token_id_; }

 private:
  void Append(std::string text, AnswerPiece* piece);
  bool IsShown(TokenId stop_token) const;

  AnswerSpec spec_;
  Detokenizer detokenizer_;
  std::optional<StopMatcher> stop_matcher_;          // unset without stop strings
  std::optional<ReasoningParser> reasoning_parser_;  // unset unless split_reasoning
  int32_t completion_tokens_ = 0;
  int32_t reasoning_tokens_ = 0;
  FinishReason finish_reason_ = FinishReason::kNone;
  std::string stop_matched_;
  std::optional<TokenId> stop_token_id_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_ANSWER_H_
