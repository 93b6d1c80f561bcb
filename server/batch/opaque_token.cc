#include "server/batch/opaque_token.h"

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/sha256.h"

namespace latentd {
namespace {

constexpr size_t kPositionBytes = 8;
constexpr size_t kCheckBytes = 8;

}  // namespace

std::string OpaqueToken(const std::string& scope, int64_t position) {
  std::string bytes;
  for (size_t i = 0; i < kPositionBytes; ++i) {
    bytes += static_cast<char>(static_cast<uint64_t>(position) >> (8 * i));
  }
  bytes += Sha256::Of(absl::StrCat(scope, "\n", position)).substr(0, kCheckBytes);
  return absl::WebSafeBase64Escape(bytes);
}

std::optional<int64_t> ReadOpaqueToken(const std::string& scope, const std::string& token) {
  std::string bytes;
  if (!absl::WebSafeBase64Unescape(token, &bytes)) return std::nullopt;
  if (bytes.size() != kPositionBytes + kCheckBytes) return std::nullopt;
  uint64_t position = 0;
  for (size_t i = 0; i < kPositionBytes; ++i) {
    position |= static_cast<uint64_t>(static_cast<uint8_t>(bytes[i])) << (8 * i);
  }
  const int64_t value = static_cast<int64_t>(position);
  if (value < 0 || OpaqueToken(scope, value) != token) return std::nullopt;
  return value;
}

}  // namespace latentd
