#ifndef LATENTD_SERVER_TEXT_PARTIAL_MATCH_H_
#define LATENTD_SERVER_TEXT_PARTIAL_MATCH_H_

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>

#include "absl/types/span.h"

namespace latentd {

// The size of the longest end of `text` that is the beginning, not the whole, of one of `patterns`:
// what a streaming search must hold back.
inline size_t PartialMatchSize(std::string_view text, absl::Span<const std::string> patterns) {
  size_t longest = 0;
  for (const std::string_view pattern : patterns) {
    for (size_t size = std::min(text.size(), pattern.size() - 1); size > longest; --size) {
      if (text.ends_with(pattern.substr(0, size))) longest = size;
    }
  }
  return longest;
}

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_PARTIAL_MATCH_H_
