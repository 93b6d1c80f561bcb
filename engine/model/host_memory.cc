#include "engine/model/host_memory.h"

#include <algorithm>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;

std::vector<std::string> Lines(const fs::path& file) {
  std::ifstream stream(file);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) lines.push_back(std::move(line));
  return lines;
}

// A file of one number; nullopt for "max" and for a file that is not there.
std::optional<uint64_t> Number(const fs::path& file) {
  uint64_t value = 0;
  const std::vector<std::string> lines = Lines(file);
  if (lines.empty() || !absl::SimpleAtoi(lines[0], &value)) return std::nullopt;
  return value;
}

// The value of `key` in a file of "key value [kB]" lines.
std::optional<uint64_t> Field(const fs::path& file, std::string_view key) {
  for (const std::string& line : Lines(file)) {
    const std::vector<std::string> words = absl::StrSplit(line, ' ', absl::SkipEmpty());
    uint64_t value = 0;
    if (words.size() >= 2 && words[0] == key && absl::SimpleAtoi(words[1], &value)) {
      return words.size() >= 3 && words[2] == "kB" ? value * 1024 : value;
    }
  }
  return std::nullopt;
}

// What one control group leaves. Its use counts the cache of files too, which is not lost for us.
std::optional<uint64_t> GroupLeaves(const fs::path& group, const char* limit, const char* usage) {
  const std::optional<uint64_t> max = Number(group / limit);
  if (!max) return std::nullopt;
  const uint64_t used = Number(group / usage).value_or(0);
  const uint64_t cache = Field(group / "memory.stat", "inactive_file").value_or(0) +
                         Field(group / "memory.stat", "active_file").value_or(0);
  const uint64_t held = used - std::min(used, cache);
  return *max - std::min(*max, held);
}

}  // namespace

uint64_t AvailableMemoryBytes(const fs::path& root) {
  uint64_t available = Field(root / "proc/meminfo", "MemAvailable:").value_or(UINT64_MAX);
  for (const std::string& line : Lines(root / "proc/self/cgroup")) {
    // hierarchy:controllers:path; version 2 has no controllers.
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3) continue;
    const bool v2 = parts[1].empty();
    const std::vector<std::string> controllers = absl::StrSplit(parts[1], ',');
    if (!v2 && std::find(controllers.begin(), controllers.end(), "memory") == controllers.end())
      continue;
    const fs::path mount = root / (v2 ? "sys/fs/cgroup" : "sys/fs/cgroup/memory");
    // A limit may be set on any group above. In a container the path is often that of the host and
    // does not exist, but the mount itself is then the container's group.
    fs::path group = fs::path(parts[2]).relative_path();
    for (bool more = true; more; group = group.parent_path()) {
      const auto leaves =
          v2 ? GroupLeaves(mount / group, "memory.max", "memory.current")
             : GroupLeaves(mount / group, "memory.limit_in_bytes", "memory.usage_in_bytes");
      available = std::min(available, leaves.value_or(UINT64_MAX));
      more = !group.empty();
    }
  }
  return available;
}

uint64_t AvailableMemoryBytes() { return AvailableMemoryBytes("/"); }

}  // namespace latentd
