#include "server/text/utf8.h"

#include <cstddef>
#include <cstdint>

namespace latentd {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";

// The bytes at the front of `s` that are one unit.
struct Unit {
  size_t size;
  enum { kCharacter, kInvalid, kIncomplete } kind;
};

// Unicode 15, table 3-7. REQUIRES: s is not empty.
Unit NextUnit(std::string_view s) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(s[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {1, Unit::kCharacter};
  if (first < 0xC2 || first > 0xF4) return {1, Unit::kInvalid};
  const size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  // No overlong forms, surrogates, or code points above U+10FFFF.
  uint8_t low = first == 0xE0 ? 0xA0 : first == 0xF0 ? 0x90 : 0x80;
  uint8_t high = first == 0xED ? 0x9F : first == 0xF4 ? 0x8F : 0xBF;
  for (size_t i = 1; i < size; ++i) {
    if (i == s.size()) return {i, Unit::kIncomplete};
    if (byte(i) < low || byte(i) > high) return {i, Unit::kInvalid};
    low = 0x80;
    high = 0xBF;
  }
  return {size, Unit::kCharacter};
}

}  // namespace

void TakeUtf8(std::string& bytes, bool at_end, std::string& out) {
  std::string_view rest = bytes;
  while (!rest.empty()) {
    const Unit unit = NextUnit(rest);
    if (unit.kind == Unit::kIncomplete && !at_end) break;
    out += unit.kind == Unit::kCharacter ? rest.substr(0, unit.size) : kReplacement;
    rest.remove_prefix(unit.size);
  }
  bytes.erase(0, bytes.size() - rest.size());
}

bool IsUtf8(std::string_view text) {
  while (!text.empty()) {
    const Unit unit = NextUnit(text);
    if (unit.kind != Unit::kCharacter) return false;
    text.remove_prefix(unit.size);
  }
  return true;
}

}  // namespace latentd
