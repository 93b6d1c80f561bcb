#include "server/config.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <fstream>
#include <optional>
#include <sstream>
#include <system_error>

#include "engine/status.h"
#include "fmt/format.h"
#include "yaml-cpp/yaml.h"

namespace latentd {
namespace {

constexpr size_t kMaxFileBytes = size_t{1} << 20;

// The whole of `text` as a number; nullopt if there is more, or less, than one.
template <typename Number>
std::optional<Number> ParseNumber(std::string_view text) {
  Number number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

constexpr std::array<std::pair<std::string_view, int64_t>, 9> kSizeUnits = {{
    {"KiB", int64_t{1} << 10},
    {"MiB", int64_t{1} << 20},
    {"GiB", int64_t{1} << 30},
    {"TiB", int64_t{1} << 40},
    {"KB", 1000},
    {"MB", 1000 * 1000},
    {"GB", 1000 * 1000 * 1000},
    {"TB", int64_t{1000} * 1000 * 1000 * 1000},
    {"B", 1},
}};

std::string NumberText(const ConfigKey& key, int64_t value) {
  if (key.type == ConfigType::kSize) return SizeText(value);
  if (key.type == ConfigType::kDuration) return absl::FormatDuration(absl::Milliseconds(value));
  return std::to_string(value);
}

absl::Status Refuse(const ConfigKey& key, std::string_view value, std::string_view allowed) {
  return absl::InvalidArgumentError(fmt::format("{} is '{}'; {}", key.name, value, allowed));
}

absl::Status CheckRange(const ConfigKey& key, std::string_view text, int64_t value) {
  if (value >= key.min && value <= key.max) return absl::OkStatus();
  return Refuse(key, text, "allowed are " + ConfigRange(key));
}

bool IsAddress(std::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == std::string_view::npos || colon == 0) return false;
  const auto port = ParseNumber<int32_t>(text.substr(colon + 1));
  return port && *port >= 0 && *port <= 65535;
}

// The place of this process in a LeaderWorkerSet, which gives these variables to its pods.
absl::Status ApplyLeaderWorkerSet(const Environment& environment, ServeConfig* config) {
  for (const auto& [variable, name] :
       {std::pair{"LWS_GROUP_SIZE", "num_nodes"}, std::pair{"LWS_WORKER_INDEX", "node"}}) {
    const char* value = environment(variable);
    if (value == nullptr || *value == '\0') continue;
    const absl::Status status = SetConfigValue(*FindConfigKey(name), value, config);
    if (!status.ok()) {
      return absl::InvalidArgumentError(
          fmt::format("{}, from {}", std::string(status.message()), variable));
    }
  }
  return absl::OkStatus();
}

void DefaultLeader(const Environment& environment, ServeConfig* config) {
  const char* host = environment("LWS_LEADER_ADDRESS");
  if (!config->leader.empty() || config->node == 0 || host == nullptr || *host == '\0') return;
  const std::string listen = ClusterListenAddress(*config);
  config->leader = host + listen.substr(listen.rfind(':'));
}

absl::Status CheckGroup(const ServeConfig& config) {
  if (config.world_size % config.num_nodes != 0) {
    return absl::InvalidArgumentError(fmt::format(
        "world_size is {} and num_nodes is {}; every node must have as many ranks (num_nodes is "
        "LWS_GROUP_SIZE where it is not given)",
        config.world_size, config.num_nodes));
  }
  if (config.node >= config.num_nodes) {
    return absl::InvalidArgumentError(
        fmt::format("node is {}; with num_nodes {} allowed are 0 .. {}", config.node,
                    config.num_nodes, config.num_nodes - 1));
  }
  if (config.leader.ends_with(":0")) {
    return absl::InvalidArgumentError(fmt::format(
        "leader is '{}'; its port must be the one that the leader listens on", config.leader));
  }
  if (config.num_nodes > 1 && ClusterListenAddress(config).ends_with(":0")) {
    return absl::InvalidArgumentError(
        fmt::format("cluster_listen is '{}'; with num_nodes {} the other nodes must know its port",
                    config.cluster_listen, config.num_nodes));
  }
  if (config.node > 0 && config.leader.empty()) {
    return absl::InvalidArgumentError(fmt::format(
        "leader is empty; node {} must know it: host:port of the daemon's cluster_listen",
        config.node));
  }
  const std::string listen = ClusterListenAddress(config);
  if (HasRankProcesses(config) && !listen.ends_with(":0") &&
      (listen == config.listen || listen == config.http_listen)) {
    return absl::InvalidArgumentError(
        fmt::format("cluster_listen and {} are both '{}'; they must differ",
                    listen == config.listen ? "listen" : "http_listen", listen));
  }
  return absl::OkStatus();
}

// What no single key can tell.
absl::Status CheckTogether(const ServeConfig& config) {
  if (config.listen.empty()) {
    return absl::InvalidArgumentError("listen is empty; it must be host:port");
  }
  if (config.listen == config.http_listen && !config.listen.ends_with(":0")) {
    return absl::InvalidArgumentError(
        fmt::format("listen and http_listen are both '{}'; they must differ", config.listen));
  }
  if (config.max_step_tokens < config.max_running) {
    return absl::InvalidArgumentError(
        fmt::format("max_step_tokens is {} and max_running is {}; every running sequence needs a "
                    "token of the step",
                    config.max_step_tokens, config.max_running));
  }
  if (!config.batch_dir.empty() && config.batch_max_item_bytes > config.max_message_bytes) {
    return absl::InvalidArgumentError(
        fmt::format("batch_max_item_bytes is {} and max_message_bytes is {}; an item must fit into "
                    "a message",
                    SizeText(config.batch_max_item_bytes), SizeText(config.max_message_bytes)));
  }
  return CheckGroup(config);
}

}  // namespace

std::optional<int64_t> ParseSize(std::string_view text) {
  int64_t scale = 1;
  for (const auto& [suffix, bytes] : kSizeUnits) {
    if (text.size() > suffix.size() && text.substr(text.size() - suffix.size()) == suffix) {
      text.remove_suffix(suffix.size());
      scale = bytes;
      break;
    }
  }
  while (!text.empty() && text.back() == ' ') text.remove_suffix(1);
  if (const auto whole = ParseNumber<int64_t>(text)) {
    if (*whole < 0 || *whole > std::numeric_limits<int64_t>::max() / scale) return std::nullopt;
    return *whole * scale;
  }
  const auto number = ParseNumber<double>(text);  // 1.5GiB
  if (!number || scale == 1 || !(*number >= 0) || *number * scale > 9e18) return std::nullopt;
  return static_cast<int64_t>(*number * scale);
}

std::string SizeText(int64_t bytes) {
  for (auto unit = kSizeUnits.rend() - 4; unit != kSizeUnits.rend(); ++unit) {  // TiB .. KiB
    if (bytes >= unit->second && bytes % unit->second == 0) {
      return fmt::format("{}{}", bytes / unit->second, unit->first);
    }
  }
  return std::to_string(bytes);
}

std::string ConfigFlag(const ConfigKey& key) {
  std::string flag = "--" + std::string(key.name);
  std::replace(flag.begin(), flag.end(), '_', '-');
  return flag;
}

std::string ConfigUnit(const ConfigKey& key) {
  switch (key.type) {
    case ConfigType::kString:
      return key.choices.empty() ? "text" : fmt::format("{}", fmt::join(key.choices, ", "));
    case ConfigType::kAddress:
      return "address";
    case ConfigType::kInt:
      return std::string(key.unit);
    case ConfigType::kSize:
      return "bytes";
    case ConfigType::kBool:
      return "true, false";
    case ConfigType::kDuration:
      return "duration";
  }
  return "";
}

std::string ConfigRange(const ConfigKey& key) {
  if (std::holds_alternative<std::string ServeConfig::*>(key.member) ||
      key.type == ConfigType::kBool) {
    return "";
  }
  return fmt::format("{} .. {}", NumberText(key, key.min), NumberText(key, key.max));
}

std::string ConfigValue(const ConfigKey& key, const ServeConfig& config) {
  switch (key.type) {
    case ConfigType::kString:
    case ConfigType::kAddress:
      return config.*std::get<std::string ServeConfig::*>(key.member);
    case ConfigType::kInt:
      return std::to_string(config.*std::get<int64_t ServeConfig::*>(key.member));
    case ConfigType::kSize:
      return SizeText(config.*std::get<int64_t ServeConfig::*>(key.member));
    case ConfigType::kBool:
      return config.*std::get<bool ServeConfig::*>(key.member) ? "true" : "false";
    case ConfigType::kDuration:
      return absl::FormatDuration(config.*std::get<absl::Duration ServeConfig::*>(key.member));
  }
  return "";
}

absl::Status SetConfigValue(const ConfigKey& key, std::string_view value, ServeConfig* config) {
  switch (key.type) {
    case ConfigType::kString: {
      if (!key.choices.empty() &&
          std::find(key.choices.begin(), key.choices.end(), value) == key.choices.end()) {
        return Refuse(key, value, fmt::format("allowed are {}", fmt::join(key.choices, ", ")));
      }
      config->*std::get<std::string ServeConfig::*>(key.member) = std::string(value);
      return absl::OkStatus();
    }
    case ConfigType::kAddress: {
      if (!value.empty() && !IsAddress(value)) {
        return Refuse(key, value, "it must be host:port, with a port of 0 .. 65535");
      }
      config->*std::get<std::string ServeConfig::*>(key.member) = std::string(value);
      return absl::OkStatus();
    }
    case ConfigType::kInt: {
      const auto number = ParseNumber<int64_t>(value);
      if (!number) return Refuse(key, value, "it must be a whole number");
      RETURN_IF_ERROR(CheckRange(key, value, *number));
      config->*std::get<int64_t ServeConfig::*>(key.member) = *number;
      return absl::OkStatus();
    }
    case ConfigType::kSize: {
      const std::optional<int64_t> bytes = ParseSize(value);
      if (!bytes)
        return Refuse(key, value, "it must be a number of bytes such as 1073741824 or 4GiB");
      RETURN_IF_ERROR(CheckRange(key, value, *bytes));
      config->*std::get<int64_t ServeConfig::*>(key.member) = *bytes;
      return absl::OkStatus();
    }
    case ConfigType::kBool: {
      if (value != "true" && value != "false") return Refuse(key, value, "allowed are true, false");
      config->*std::get<bool ServeConfig::*>(key.member) = value == "true";
      return absl::OkStatus();
    }
    case ConfigType::kDuration: {
      absl::Duration duration;
      if (!absl::ParseDuration(std::string(value), &duration)) {
        return Refuse(key, value, "it must be a duration with its unit, such as 300s, 5m or 1h30m");
      }
      const int64_t milliseconds =
          duration < absl::ZeroDuration() ? -1 : absl::ToInt64Milliseconds(duration);
      RETURN_IF_ERROR(CheckRange(key, value, milliseconds));
      config->*std::get<absl::Duration ServeConfig::*>(key.member) = duration;
      return absl::OkStatus();
    }
  }
  return absl::InternalError("unknown config type");
}

absl::Status ApplyYaml(std::string_view text, std::string_view file, ServeConfig* config) {
  const auto error = [&](const YAML::Mark& mark, std::string_view message) {
    return absl::InvalidArgumentError(fmt::format("{}:{}: {}", file, mark.line + 1, message));
  };
  try {
    const std::vector<YAML::Node> documents = YAML::LoadAll(std::string(text));
    if (documents.empty()) return absl::OkStatus();
    if (documents.size() > 1) {
      return error(documents[1].Mark(), "a second document; the file must hold one");
    }
    const YAML::Node& root = documents[0];
    if (root.IsNull()) return absl::OkStatus();
    if (!root.IsMap())
      return error(root.Mark(), "the file must be a mapping of 'key: value' lines");
    std::vector<std::string> seen;
    for (const auto& entry : root) {
      const YAML::Mark mark = entry.first.Mark();
      if (!entry.first.IsScalar()) return error(mark, "a key must be a plain word");
      const std::string& name = entry.first.Scalar();
      const ConfigKey* key = FindConfigKey(name);
      if (key == nullptr) {
        const std::string nearest = NearestConfigKey(name);
        return error(mark, fmt::format("unknown key '{}'{}", name,
                                       nearest.empty() ? "" : "; did you mean '" + nearest + "'?"));
      }
      if (std::find(seen.begin(), seen.end(), key->name) != seen.end()) {
        return error(mark, fmt::format("key '{}' is given twice", name));
      }
      seen.emplace_back(key->name);
      if (!entry.second.IsScalar()) {
        return error(
            mark, fmt::format("{} {}", key->name,
                              entry.second.IsNull() ? "has no value"
                                                    : "must be one value, not a list or mapping"));
      }
      const absl::Status status = SetConfigValue(*key, entry.second.Scalar(), config);
      if (!status.ok()) return error(entry.second.Mark(), std::string(status.message()));
    }
    return absl::OkStatus();
  } catch (const YAML::Exception& exception) {
    return error(exception.mark, exception.msg);
  }
}

absl::StatusOr<ServeConfig> LoadServeConfig(
    const std::filesystem::path& file,
    const std::vector<std::pair<std::string, std::string>>& flags, const Environment& environment) {
  ServeConfig config;
  RETURN_IF_ERROR(ApplyLeaderWorkerSet(environment, &config));
  if (!file.empty()) {
    std::error_code code;
    const auto size = std::filesystem::file_size(file, code);
    if (code) {
      return absl::InvalidArgumentError(
          fmt::format("config file {}: {}", file.string(), code.message()));
    }
    if (size > kMaxFileBytes) {
      return absl::InvalidArgumentError(fmt::format(
          "config file {} has {} bytes; at most {} are read", file.string(), size, kMaxFileBytes));
    }
    std::ifstream stream(file, std::ios::binary);
    std::ostringstream text;
    if (!(text << stream.rdbuf()) && size > 0) {
      return absl::InvalidArgumentError(
          fmt::format("config file {} cannot be read", file.string()));
    }
    RETURN_IF_ERROR(ApplyYaml(text.str(), file.string(), &config));
  }
  for (const auto& [name, value] : flags) {
    const ConfigKey* key = FindConfigKey(name);
    if (key == nullptr) {
      return absl::InvalidArgumentError(fmt::format("unknown config key '{}'", name));
    }
    RETURN_IF_ERROR(SetConfigValue(*key, value, &config));
  }
  DefaultLeader(environment, &config);
  RETURN_IF_ERROR(CheckTogether(config));
  return config;
}

bool HasRankProcesses(const ServeConfig& config) { return config.world_size > 1 || config.isolate; }

std::string ClusterListenAddress(const ServeConfig& config) {
  if (!config.cluster_listen.empty()) return config.cluster_listen;
  return config.num_nodes > 1 ? "0.0.0.0:50052" : "127.0.0.1:0";
}

int32_t RanksPerNode(const ServeConfig& config) {
  return static_cast<int32_t>(config.world_size / config.num_nodes);
}

std::string DescribeConfig(const ServeConfig& config) {
  std::string text;
  for (const ConfigKey& key : ConfigKeys()) {
    text += fmt::format("{} = {}\n", key.name, ConfigValue(key, config));
  }
  return text;
}

std::string ExampleYaml() {
  std::string text =
      "# latentd's configuration: every key, what it means, its default. Written by `latentd "
      "config`.\n"
      "# Flags of the same names win over this file: --max-running 64.\n";
  const ServeConfig defaults;
  for (const ConfigKey& key : ConfigKeys()) {
    constexpr size_t kColumns = 98;
    std::string line = "#";
    std::istringstream words{std::string(key.help)};
    text += '\n';
    for (std::string word; words >> word;) {
      if (line.size() + 1 + word.size() > kColumns) {
        text += line + '\n';
        line = "#";
      }
      line += ' ' + word;
    }
    text += line + '\n';
    const std::string range = ConfigRange(key);
    text += fmt::format("# {}{}\n", ConfigUnit(key), range.empty() ? "" : ", " + range);
    const std::string value = ConfigValue(key, defaults);
    text += fmt::format("{}: {}\n", key.name, value.empty() ? "''" : value);
  }
  return text;
}

absl::StatusOr<std::filesystem::path> FindDemoModel(const std::filesystem::path& executable) {
  const std::filesystem::path bin = executable.parent_path();
  const std::filesystem::path candidates[] = {
      (bin / "../deploy/demo-model").lexically_normal(),
      (bin / "../share/latentd/demo-model").lexically_normal(),
  };
  std::error_code code;
  for (const auto& candidate : candidates) {
    if (std::filesystem::exists(candidate / "config.json", code)) return candidate;
  }
  return absl::NotFoundError(
      fmt::format("no model is given and the demo model is neither in {} nor in {}; give one with "
                  "--model DIR",
                  candidates[0].string(), candidates[1].string()));
}

}  // namespace latentd
