#include "server/answer.h"

#include <algorithm>
#include <utility>

namespace latentd {

Answer::Answer(AnswerSpec spec)
    : spec_(std::move(spec)), detokenizer_(spec_.tokenizer, spec_.skip_special_tokens) {
  if (!spec_.stop.empty()) stop_matcher_.emplace(spec_.stop, spec_.include_stop);
  if (spec_.split_reasoning) reasoning_parser_.emplace(spec_.prompt_tail);
}

bool Answer::IsShown(TokenId stop_token) const {
  return spec_.include_stop &&
         std::find(spec_.shown_stop_tokens.begin(), spec_.shown_stop_tokens.end(), stop_token) !=
             spec_.shown_stop_tokens.end();
}

void Answer::Append(std::string text, AnswerPiece* piece) {
  if (!reasoning_parser_) {
    piece->content += text;
    return;
  }
  ReasoningParser::Parts parts = reasoning_parser_->Push(text);
  piece->reasoning += parts.reasoning;
  piece->content += parts.content;
}

AnswerPiece Answer::Push(TokenId token, FinishReason finish) {
  AnswerPiece piece;
  ++completion_tokens_;
  const bool was_reasoning = reasoning_parser_ && reasoning_parser_->in_reasoning();
  const bool stopped_by_token = finish == FinishReason::kStop;

  std::string text;
  if (!stopped_by_token || IsShown(token)) text = detokenizer_.Push(token);
  if (finish != FinishReason::kNone) text += detokenizer_.Flush();

  if (!stop_matcher_ || completion_tokens_ <= spec_.min_tokens) {
    Append(std::move(text), &piece);
  } else {
    Append(stop_matcher_->Push(text), &piece);
  }
  if (stop_matcher_ && stop_matcher_->matched()) {
    finish_reason_ = FinishReason::kStop;
    stop_matched_ = stop_matcher_->match();
  } else if (finish != FinishReason::kNone) {
    if (stop_matcher_) Append(stop_matcher_->Flush(), &piece);
    finish_reason_ = finish;
    if (stopped_by_token) {
      stop_matched_ = spec_.tokenizer->Decode({&token, 1}, /*skip_special_tokens=*/false);
      stop_token_id_ = token;
    }
  }

  // The tags count as reasoning: a token does that begins in it or ends in it.
  if (was_reasoning || (reasoning_parser_ && reasoning_parser_->in_reasoning())) {
    ++reasoning_tokens_;
  }
  if (finish_reason_ != FinishReason::kNone) {
    piece.finished = true;
    if (reasoning_parser_) {
      ReasoningParser::Parts rest = reasoning_parser_->Flush();
      piece.reasoning += rest.reasoning;
      piece.content += rest.content;
    }
  }
  return piece;
}

}  // namespace latentd
