#ifndef LATENTD_SERVER_TEXT_REASONING_PARSER_H_
#define LATENTD_SERVER_TEXT_REASONING_PARSER_H_

#include <string>
#include <string_view>

namespace latentd {

// Splits a streamed answer at <think> and </think>. The tags themselves, the line break after
// <think>, the one before </think> and the blank lines after it are in neither part. Not
// thread-safe.
class ReasoningParser {
 public:
  struct Parts {
    std::string reasoning;
    std::string content;
  };

  // `prompt_tail`: the rendered prompt, or its end from where the last turn begins (64 bytes
  // suffice unless a message is continued). If it ends inside an open <think>, the answer begins
  // with reasoning. An answer that itself begins with <think> does so too.
  explicit ReasoningParser(std::string_view prompt_tail);

  Parts Push(std::string_view text);
  // The end of the text: what was held back because it might have become a tag.
  Parts Flush();

  // Whether the text so far ends within reasoning; decides to which part a token counts.
  bool in_reasoning() const { return state_ == State::kReasoning; }

 private:
  enum class State { kStart, kReasoning, kAfterReasoning, kContent };

  Parts Drain(bool at_end);
  // The reasoning that held_ begins with; leaves kReasoning at its end.
  std::string TakeReasoning(bool at_end);

  State state_;
  bool skip_line_break_ = false;  // <think> was read, what follows it not yet
  std::string held_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_REASONING_PARSER_H_
