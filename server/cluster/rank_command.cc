#include "server/cluster/rank_command.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <set>
#include <string_view>
#include <thread>

#include "fmt/format.h"

namespace latentd {
namespace {

// What a child must be told even where it is the default: its environment may say otherwise.
const std::set<std::string_view>& Always() {
  static const auto* const kKeys =
      new std::set<std::string_view>{"world_size", "num_nodes", "node", "leader"};
  return *kKeys;
}

int64_t ThreadsOfRank(const ServeConfig& config) {
  if (config.threads > 0) return config.threads;
  return std::max<int64_t>(1, std::thread::hardware_concurrency() / RanksPerNode(config));
}

}  // namespace

ProcessCommand RankCommand(const ServeConfig& config, const std::string& leader, int32_t rank) {
  ServeConfig own = config;
  own.leader = leader;
  own.device += rank - config.node * RanksPerNode(config);
  own.threads = ThreadsOfRank(config);

  ProcessCommand command;
  // The program that runs, also when its file has been replaced since.
  command.executable = "/proc/self/exe";
  command.arguments = {"latentd", "rank", fmt::format("--rank={}", rank),
                       fmt::format("--parent-pid={}", getpid())};
  const ServeConfig defaults;
  for (const ConfigKey& key : ConfigKeys()) {
    const std::string value = ConfigValue(key, own);
    if (value == ConfigValue(key, defaults) && Always().count(key.name) == 0) continue;
    if (value.empty()) {  // which --flag= would not be
      command.arguments.insert(command.arguments.end(), {ConfigFlag(key), ""});
    } else {
      command.arguments.push_back(ConfigFlag(key) + "=" + value);
    }
  }
  // NVLink multicast needs a fabric manager that grants it, and must stay off where GPUs are shared
  // with others; whoever has both to himself says so in the environment.
  for (const char* variable : {"NCCL_NVLS_ENABLE=0", "NVSHMEM_DISABLE_NVLS=1"}) {
    const std::string name(variable, std::string_view(variable).find('='));
    if (std::getenv(name.c_str()) == nullptr) command.environment.emplace_back(variable);
  }
  return command;
}

std::string DialAddress(const std::string& listen, int port) {
  const size_t colon = listen.rfind(':');
  std::string host = listen.substr(0, colon);
  if (host == "0.0.0.0") host = "127.0.0.1";
  if (host == "[::]") host = "[::1]";
  return fmt::format("{}:{}", host, port);
}

}  // namespace latentd
