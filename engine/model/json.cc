#include "engine/model/json.h"

#include <exception>
#include <fstream>
#include <set>
#include <system_error>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace latentd {
namespace {

constexpr int kMaxDepth = 32;
constexpr size_t kMaxShownChars = 160;
constexpr size_t kReadBytes = 64 << 10;

// Watches the parser for what JSON allows and we do not.
class Guard {
 public:
  // The library's parser callback; false drops the value, which ends in an error anyway.
  bool operator()(int depth, nlohmann::json::parse_event_t event, nlohmann::json& parsed) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > kMaxDepth) {
      Fail(absl::StrFormat("nested deeper than %d levels", kMaxDepth));
    } else if (event == Event::object_start) {
      keys_.emplace_back();
    } else if (event == Event::object_end && !keys_.empty()) {
      keys_.pop_back();
    } else if (event == Event::key && !keys_.empty()) {
      const auto& key = parsed.get_ref<const std::string&>();
      if (!keys_.back().insert(key).second)
        Fail(absl::StrCat("'", ShownName(key), "' occurs twice"));
    }
    return error_.empty();
  }

  const std::string& error() const { return error_; }

 private:
  void Fail(std::string error) {
    if (error_.empty()) error_ = std::move(error);
  }

  std::vector<std::set<std::string>> keys_;  // of each open object
  std::string error_;
};

}  // namespace

absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, std::string_view what) {
  Guard guard;
  nlohmann::json value;
  try {
    value = nlohmann::json::parse(text.begin(), text.end(), std::ref(guard));
  } catch (const std::exception& e) {
    // Without the library's "[json.exception.parse_error.101] ".
    std::string_view message = e.what();
    if (const size_t end = message.find("] "); end != message.npos) message.remove_prefix(end + 2);
    return absl::InvalidArgumentError(absl::StrCat(
        std::string(what), ": ", guard.error().empty() ? ShownName(message) : guard.error()));
  }
  if (!guard.error().empty()) {
    return absl::InvalidArgumentError(absl::StrCat(std::string(what), ": ", guard.error()));
  }
  if (!value.is_object()) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(what), ": is ", value.type_name(), ", must be a JSON object"));
  }
  return value;
}

absl::StatusOr<std::string> ReadTextFile(const std::filesystem::path& file, size_t max_bytes) {
  std::error_code error;
  const auto status = std::filesystem::status(file, error);
  if (!std::filesystem::exists(status)) {
    return absl::NotFoundError(absl::StrCat(file.string(), ": no such file"));
  }
  if (!std::filesystem::is_regular_file(status)) {
    return absl::InvalidArgumentError(absl::StrCat(file.string(), ": not a regular file"));
  }
  std::ifstream stream(file, std::ios::binary);
  if (!stream) {
    return absl::PermissionDeniedError(absl::StrCat(file.string(), ": cannot be opened"));
  }
  // By pieces, until the end or the limit: the size that matters is of what is read, not what a
  // file system said before.
  std::string text;
  std::vector<char> piece(kReadBytes);
  while (stream && text.size() <= max_bytes) {
    stream.read(piece.data(), static_cast<std::streamsize>(piece.size()));
    text.append(piece.data(), static_cast<size_t>(stream.gcount()));
  }
  if (stream.bad()) return absl::DataLossError(absl::StrCat(file.string(), ": read error"));
  if (text.size() > max_bytes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: larger than %d bytes", file.string(), max_bytes));
  }
  return text;
}

std::string Shown(const nlohmann::json& value) {
  // Not dump() of a container: it would recurse, and nobody reads a screen of JSON in an error.
  if (value.is_object()) return "an object";
  if (value.is_array() && value.size() > 8) return absl::StrFormat("a list of %d", value.size());
  return ShownName(value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace));
}

std::string ShownName(std::string_view name) {
  std::string shown(name.substr(0, kMaxShownChars));
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || static_cast<unsigned char>(c) >= 0x7f) c = '?';
  }
  if (name.size() > kMaxShownChars) shown += "...";
  return shown;
}

}  // namespace latentd
