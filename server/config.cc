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

constexpr int64_t kMaxTokens = int64_t{1} << 30;
constexpr int64_t kDay = 24 * 3600 * 1000;  // milliseconds
constexpr size_t kMaxFileBytes = size_t{1} << 20;

const std::vector<ConfigKey>& Table() {
  using C = ServeConfig;
  using T = ConfigType;
  static const auto* const kTable = new std::vector<ConfigKey>{
      {"model", T::kString, &C::model,
       "Directory of the checkpoint: config.json, *.safetensors, tokenizer.json. Empty: the demo "
       "model."},
      {"served_model_name", T::kString, &C::served_model_name,
       "Name that clients may ask for. Empty: the last part of the model's path."},
      {"load_format",
       T::kString,
       &C::load_format,
       "Where weights come from: auto and safetensors read the checkpoint, dummy draws random "
       "ones.",
       0,
       0,
       "",
       {"auto", "safetensors", "dummy"}},
      {"engine",
       T::kString,
       &C::engine,
       "What computes the model: auto is cuda where a Hopper GPU is, else cpu.",
       0,
       0,
       "",
       {"auto", "cpu", "cuda"}},
      {"listen", T::kAddress, &C::listen,
       "Address of the gRPC listener, host:port; port 0 takes a free one."},
      {"http_listen", T::kAddress, &C::http_listen,
       "Address of the HTTP listener (/metrics /healthz /livez /readyz), ip:port. Empty: none."},
      {"threads", T::kInt, &C::threads, "Threads that compute, of the CPU engine. 0: one per core.",
       0, 4096, "threads"},
      {"device", T::kInt, &C::device, "The GPU of the CUDA engine, as the driver counts them.", 0,
       1023, "GPU"},
      {"kv_cache_memory", T::kSize, &C::kv_cache_memory,
       "Memory of the latent KV cache; rounded down to whole blocks of 64 tokens. 0: 1 GiB on the "
       "CPU; on a GPU all that is left beside weights and workspace.",
       0, int64_t{1} << 50},
      {"kv_cache_tokens", T::kInt, &C::kv_cache_tokens,
       "Size of the KV cache in tokens instead of bytes, rounded up to whole blocks. 0: as "
       "kv_cache_memory says.",
       0, kMaxTokens, "tokens"},
      {"max_model_len", T::kInt, &C::max_model_len,
       "Longest prompt and completion together. 0: the model's max_position_embeddings, or what "
       "the KV "
       "cache holds if that is less.",
       0, kMaxTokens, "tokens"},
      {"max_step_tokens", T::kInt, &C::max_step_tokens,
       "Tokens computed in one step, at most; longer prompts are computed in chunks.", 1, 1 << 20,
       "tokens"},
      {"max_running", T::kInt, &C::max_running, "Sequences computed in one step, at most.", 1,
       65536, "sequences"},
      {"max_waiting", T::kInt, &C::max_waiting,
       "Requests that may wait for a place; one more is refused with RESOURCE_EXHAUSTED.", 1,
       1 << 20, "requests"},
      {"prefix_caching", T::kBool, &C::prefix_caching,
       "Keep the KV cache of finished prompts and reuse it where a prompt begins alike."},
      {"max_graph_sequences", T::kInt, &C::max_graph_sequences,
       "Decode steps of up to so many sequences are launched as one CUDA graph. 0: none.", 0, 65536,
       "sequences"},
      {"batch_invariant", T::kBool, &C::batch_invariant,
       "On the CUDA engine too a sequence's tokens do not depend, bit for bit, on what else is "
       "computed; slower. The CPU engine is so always."},
      {"step_deadline", T::kDuration, &C::step_deadline,
       "A step that lasts longer is an engine that is lost: streams end with UNAVAILABLE and the "
       "daemon exits. A loading that moves nothing for so long makes liveness fail.",
       1000, kDay},
      {"chat_template", T::kString, &C::chat_template,
       "File of a Jinja chat template to use instead of the model's own. Empty: the model's."},
      {"allow_request_chat_template", T::kBool, &C::allow_request_chat_template,
       "Let requests bring their own chat template; for trusted clients only."},
      {"max_message_bytes", T::kSize, &C::max_message_bytes,
       "Largest request message; a larger one is refused with RESOURCE_EXHAUSTED.", 1024,
       int64_t{1} << 30},
      {"max_concurrent_requests", T::kInt, &C::max_concurrent_requests,
       "Generating calls that may be open at once; one more is refused with RESOURCE_EXHAUSTED.", 1,
       1 << 20, "calls"},
      {"drain_timeout", T::kDuration, &C::drain_timeout,
       "How long after SIGTERM running answers may go on; what is left then ends with UNAVAILABLE.",
       0, kDay},
      {"max_connection_age", T::kDuration, &C::max_connection_age,
       "Age at which a connection is asked to reconnect, so that load spreads over new servers; "
       "its "
       "calls may still run for drain_timeout. 0: never.",
       0, kDay},
      {"keepalive_time", T::kDuration, &C::keepalive_time,
       "A connection silent for so long is pinged.", 1000, kDay},
      {"keepalive_timeout", T::kDuration, &C::keepalive_timeout,
       "A ping unanswered for so long ends the connection and frees what its calls hold.", 1000,
       kDay},
      {"min_ping_interval", T::kDuration, &C::min_ping_interval,
       "Clients that ping more often than this are disconnected (too_many_pings).", 1000, kDay},
      {"log_level",
       T::kString,
       &C::log_level,
       "Least level that is logged.",
       0,
       0,
       "",
       {"debug", "info", "warning", "error"}},
      {"log_format",
       T::kString,
       &C::log_format,
       "One line a record, as key=value text or as JSON.",
       0,
       0,
       "",
       {"text", "json"}},
      {"termination_log", T::kString, &C::termination_log,
       "File that gets the reason when the daemon fails (Kubernetes: /dev/termination-log). Empty: "
       "none."},
  };
  return *kTable;
}

std::string WithUnderscores(std::string_view name) {
  std::string text(name);
  std::replace(text.begin(), text.end(), '-', '_');
  return text;
}

// The whole of `text` as a number; nullopt if there is more, or less, than one.
template <typename Number>
std::optional<Number> ParseNumber(std::string_view text) {
  Number number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return number;
}

int EditDistance(std::string_view a, std::string_view b) {
  std::vector<int> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = static_cast<int>(j);
  for (size_t i = 1; i <= a.size(); ++i) {
    int diagonal = row[0];
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= b.size(); ++j) {
      const int substituted = diagonal + (a[i - 1] == b[j - 1] ? 0 : 1);
      diagonal = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, substituted});
    }
  }
  return row[b.size()];
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
  return absl::OkStatus();
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

absl::Span<const ConfigKey> ConfigKeys() { return Table(); }

const ConfigKey* FindConfigKey(std::string_view name) {
  const std::string normalized = WithUnderscores(name);
  for (const ConfigKey& key : Table()) {
    if (key.name == normalized) return &key;
  }
  return nullptr;
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

std::string NearestConfigKey(std::string_view name) {
  std::string normalized = WithUnderscores(name);
  for (char& c : normalized) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::string nearest;
  int best = std::max<int>(2, static_cast<int>(normalized.size()) / 3) + 1;
  for (const ConfigKey& key : Table()) {
    const int distance = EditDistance(normalized, key.name);
    if (distance < best) {
      best = distance;
      nearest = key.name;
    }
  }
  return nearest;
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
    const std::vector<std::pair<std::string, std::string>>& flags) {
  ServeConfig config;
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
  RETURN_IF_ERROR(CheckTogether(config));
  return config;
}

std::string DescribeConfig(const ServeConfig& config) {
  std::string text;
  for (const ConfigKey& key : Table()) {
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
  for (const ConfigKey& key : Table()) {
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
