#include "server/text/stop_matcher.h"

#include <utility>

#include "server/text/partial_match.h"

namespace latentd {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop)
    : stops_(std::move(stops)), include_stop_(include_stop) {}

std::string StopMatcher::Push(std::string_view text) {
  if (matched() || stops_.empty()) return matched() ? "" : std::string(text);
  // A match ends in the new text, and begins in `held_` or later: all before was ruled out.
  const size_t old_size = held_.size();
  held_ += text;
  for (size_t end = old_size + 1; end <= held_.size(); ++end) {
    const std::string_view seen = std::string_view(held_).substr(0, end);
    for (size_t i = 0; i < stops_.size(); ++i) {
      if (seen.ends_with(stops_[i]) && (!matched() || stops_[i].size() > match().size())) {
        matched_ = static_cast<int>(i);
      }
    }
    if (matched()) {
      std::string out = held_.substr(0, include_stop_ ? end : end - match().size());
      held_.clear();
      return out;
    }
  }
  std::string out = held_.substr(0, held_.size() - PartialMatchSize(held_, stops_));
  held_.erase(0, out.size());
  return out;
}

std::string StopMatcher::Flush() { return std::exchange(held_, ""); }

}  // namespace latentd
