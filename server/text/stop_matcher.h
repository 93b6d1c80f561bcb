#ifndef LATENTD_SERVER_TEXT_STOP_MATCHER_H_
#define LATENTD_SERVER_TEXT_STOP_MATCHER_H_

#include <string>
#include <string_view>
#include <vector>

namespace latentd {

// Looks for stop strings in streamed text, across the borders of its pieces. Text is held back only
// as long as it may still become a stop string; what is given out is never taken back. Not
// thread-safe.
class StopMatcher {
 public:
  // `stops`: none empty. With `include_stop` the matched string is left in the text.
  StopMatcher(std::vector<std::string> stops, bool include_stop);

  // Appends text, returns what may go out now. After a match everything is ignored.
  std::string Push(std::string_view text);
  // The end of the text: returns what was held back. It cannot match any more.
  std::string Flush();

  bool matched() const { return matched_ >= 0; }
  // The stop string that ended the text: the one that was complete first, and of those the longest.
  // How the text was cut into pieces makes no difference. REQUIRES: matched().
  const std::string& match() const { return stops_[matched_]; }

 private:
  std::vector<std::string> stops_;
  bool include_stop_;
  int matched_ = -1;
  std::string held_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_STOP_MATCHER_H_
