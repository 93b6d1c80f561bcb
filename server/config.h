#ifndef LATENTD_SERVER_CONFIG_H_
#define LATENTD_SERVER_CONFIG_H_

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"

namespace latentd {

// How `latentd serve` runs. The values here are the defaults; ConfigKeys() says what each one
// means.
struct ServeConfig {
  std::string model;
  std::string served_model_name;
  std::string load_format = "auto";
  std::string engine = "auto";

  int64_t world_size = 1;
  int64_t num_nodes = 1;
  int64_t node = 0;
  std::string leader;
  std::string cluster_listen;
  bool isolate = false;
  absl::Duration group_timeout = absl::Minutes(2);
  int64_t max_recoveries = 2;
  absl::Duration recovery_timeout = absl::Minutes(5);

  std::string listen = "0.0.0.0:50051";
  std::string http_listen = "0.0.0.0:9090";

  int64_t threads = 0;
  int64_t device = 0;
  int64_t kv_cache_memory = 0;  // bytes
  int64_t kv_cache_tokens = 0;
  std::string kv_cache_dtype = "auto";
  int64_t max_model_len = 0;
  int64_t max_step_tokens = 2048;
  int64_t max_running = 256;
  int64_t max_waiting = 1024;
  bool prefix_caching = true;
  int64_t max_graph_sequences = 256;
  bool batch_invariant = false;
  absl::Duration step_deadline = absl::Minutes(5);

  std::string chat_template;
  bool allow_request_chat_template = false;

  std::string batch_dir;
  int64_t batch_max_running = 0;
  int64_t batch_step_tokens = 512;
  int64_t batch_max_item_bytes = int64_t{4} << 20;
  int64_t batch_max_job_items = 1'000'000;
  int64_t batch_max_jobs = 100;
  int64_t batch_max_items = 10'000'000;
  absl::Duration batch_result_ttl = absl::Hours(30 * 24);
  absl::Duration batch_upload_ttl = absl::Hours(24);

  int64_t max_message_bytes = int64_t{16} << 20;  // bytes
  int64_t max_concurrent_requests = 4096;
  absl::Duration drain_timeout = absl::Minutes(5);
  absl::Duration max_connection_age = absl::Minutes(30);
  absl::Duration keepalive_time = absl::Minutes(1);
  absl::Duration keepalive_timeout = absl::Seconds(20);
  absl::Duration min_ping_interval = absl::Seconds(10);

  std::string log_level = "info";
  std::string log_format = "text";
  std::string termination_log;
};

enum class ConfigType { kString, kAddress, kInt, kSize, kBool, kDuration };

// One row of the table that the YAML file, the flags, `--help` and the documentation share.
struct ConfigKey {
  std::string_view name;  // of the YAML key; the flag is the same with dashes
  ConfigType type = ConfigType::kString;
  std::variant<std::string ServeConfig::*, int64_t ServeConfig::*, bool ServeConfig::*,
               absl::Duration ServeConfig::*>
      member;
  std::string_view help;
  // Inclusive. kInt: the unit of `unit`; kSize: bytes; kDuration: milliseconds.
  int64_t min = 0;
  int64_t max = std::numeric_limits<int64_t>::max();
  std::string_view unit = "";                  // kInt only: tokens, sequences, ...
  std::vector<std::string_view> choices = {};  // kString only; empty: any
  bool shared = false;  // all processes of a group must have the same value: see ConfigHash()
};

// What of the environment LoadServeConfig() looks at: std::getenv, but for tests.
using Environment = std::function<const char*(const char* name)>;

absl::Span<const ConfigKey> ConfigKeys();
const ConfigKey* FindConfigKey(std::string_view name);  // dashes and underscores are the same

std::string ConfigFlag(const ConfigKey& key);  // "--kv-cache-memory"
std::string ConfigUnit(const ConfigKey& key);  // "duration", "bytes", "tokens", "one of: auto, ..."
std::string ConfigRange(const ConfigKey& key);  // "1 .. 1024"; empty where anything goes
// The value in the form in which it is written: 5m, 1GiB, true.
std::string ConfigValue(const ConfigKey& key, const ServeConfig& config);

// A number of bytes such as 1073741824, 4GiB or 1.5TB; nullopt if it is none.
std::optional<int64_t> ParseSize(std::string_view text);
// The same the other way round, in the largest unit that is exact.
std::string SizeText(int64_t bytes);

// The known name nearest to `name`, if it is near enough to be meant; else empty.
std::string NearestConfigKey(std::string_view name);

// Sets one key from its text. INVALID_ARGUMENT names the key, the value and what is allowed.
absl::Status SetConfigValue(const ConfigKey& key, std::string_view value, ServeConfig* config);

// Sets what a YAML document (one mapping of the keys above) says. Errors name `file`, the line and
// the key, and for an unknown key the nearest known one.
absl::Status ApplyYaml(std::string_view text, std::string_view file, ServeConfig* config);

// The whole configuration: defaults, those that a LeaderWorkerSet's variables give, then `file`
// (empty: none), then `flags` (key name, value) in their order. Also checks what concerns several
// keys.
absl::StatusOr<ServeConfig> LoadServeConfig(
    const std::filesystem::path& file,
    const std::vector<std::pair<std::string, std::string>>& flags,
    const Environment& environment = [](const char* name) { return std::getenv(name); });

// True when the engine is computed by `latentd rank` processes.
bool HasRankProcesses(const ServeConfig& config);
// Where the daemon listens for them, the default filled in.
std::string ClusterListenAddress(const ServeConfig& config);
// The ranks of a node: [node * n, (node + 1) * n).
int32_t RanksPerNode(const ServeConfig& config);

// The key = value lines of `config`, for the log and `latentd check`.
std::string DescribeConfig(const ServeConfig& config);

// A configuration file with every key, what it means and its default: `latentd config`.
std::string ExampleYaml();

// Where the demo model lies: beside the build tree of `executable`, or where it was installed.
absl::StatusOr<std::filesystem::path> FindDemoModel(const std::filesystem::path& executable);

}  // namespace latentd

#endif  // LATENTD_SERVER_CONFIG_H_
