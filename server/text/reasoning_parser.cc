#include "server/text/reasoning_parser.h"

#include "server/text/partial_match.h"

namespace latentd {
namespace {

constexpr std::string_view kOpen = "<think>";
constexpr std::string_view kClose = "</think>";

}  // namespace

ReasoningParser::ReasoningParser(std::string_view prompt_tail) : state_(State::kStart) {
  const size_t open = prompt_tail.rfind(kOpen);
  if (open == prompt_tail.npos) return;
  const std::string_view after = prompt_tail.substr(open + kOpen.size());
  // A tag with a control token after it was part of an earlier turn.
  for (const std::string_view control : {"<｜", "<|"}) {
    if (after.find(control) != after.npos) return;
  }
  const size_t close = after.find(kClose);
  if (close == after.npos) {
    state_ = State::kReasoning;
    skip_line_break_ = after.empty();
  } else {
    // A closed block with nothing but line breaks after it: the answer proper has yet to begin.
    const bool at_begin = after.find_first_not_of('\n', close + kClose.size()) == after.npos;
    state_ = at_begin ? State::kAfterReasoning : State::kContent;
  }
}

ReasoningParser::Parts ReasoningParser::Push(std::string_view text) {
  held_ += text;
  return Drain(/*at_end=*/false);
}

ReasoningParser::Parts ReasoningParser::Flush() { return Drain(/*at_end=*/true); }

ReasoningParser::Parts ReasoningParser::Drain(bool at_end) {
  Parts parts;
  if (state_ == State::kStart) {
    if (held_.starts_with(kOpen)) {
      held_.erase(0, kOpen.size());
      state_ = State::kReasoning;
      skip_line_break_ = true;
    } else if (at_end || !kOpen.starts_with(held_)) {
      state_ = State::kContent;
    }
  }
  if (state_ == State::kReasoning) parts.reasoning = TakeReasoning(at_end);
  if (state_ == State::kAfterReasoning) {
    held_.erase(0, held_.find_first_not_of('\n'));
    if (!held_.empty()) state_ = State::kContent;
  }
  if (state_ == State::kContent) held_.swap(parts.content);
  return parts;
}

std::string ReasoningParser::TakeReasoning(bool at_end) {
  if (skip_line_break_ && !held_.empty()) {
    if (held_.front() == '\n') held_.erase(0, 1);
    skip_line_break_ = false;
  }
  static const std::string kHeldBack[] = {std::string(kClose), "\n" + std::string(kClose)};
  const size_t close = held_.find(kClose);
  if (close == held_.npos) {
    const size_t held_back = at_end ? 0 : PartialMatchSize(held_, kHeldBack);
    std::string reasoning = held_.substr(0, held_.size() - held_back);
    held_.erase(0, reasoning.size());
    return reasoning;
  }
  std::string reasoning = held_.substr(0, close);
  if (reasoning.ends_with('\n')) reasoning.pop_back();
  held_.erase(0, close + kClose.size());
  state_ = State::kAfterReasoning;
  return reasoning;
}

}  // namespace latentd
