#ifndef LATENTD_SERVER_TEXT_UTF8_H_
#define LATENTD_SERVER_TEXT_UTF8_H_

#include <string>
#include <string_view>

namespace latentd {

// Appends to `out` the characters that `bytes` begins with and removes them from it. Each maximal
// part that is no UTF-8 becomes one U+FFFD, as Unicode recommends (and Python and Rust do). What
// may be the beginning of a character (at most 3 bytes) is left, unless `at_end`: then it becomes
// U+FFFD too.
void TakeUtf8(std::string& bytes, bool at_end, std::string& out);

// True if all of `text` is UTF-8.
bool IsUtf8(std::string_view text);

}  // namespace latentd

#endif  // LATENTD_SERVER_TEXT_UTF8_H_
