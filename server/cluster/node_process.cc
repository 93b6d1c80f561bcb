#include "server/cluster/node_process.h"

#include <string.h>
#include <unistd.h>

#include <atomic>
#include <string>
#include <thread>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/status.h"
#include "server/cluster/leader_channel.h"
#include "server/cluster/node_agent.h"
#include "server/cluster/rank_command.h"
#include "server/fingerprint.h"
#include "server/log.h"
#include "server/process_events.h"
#include "server/version.h"

namespace latentd {
namespace {

absl::StatusOr<NodeAgentOptions> AgentOptions(const ServeConfig& config, const ModelPath& model) {
  if (config.node == 0) {
    return absl::InvalidArgumentError(
        "node is 0, which is the daemon's own (latentd serve); an agent's is 1 or more: give "
        "num_nodes, node and leader, or run it in a LeaderWorkerSet");
  }
  NodeAgentOptions options;
  options.leader = config.leader;
  options.attach.set_version(kVersion);
  options.attach.set_node(static_cast<int32_t>(config.node));
  options.attach.set_host(HostName());
  options.attach.set_pid(getpid());
  ASSIGN_OR_RETURN(*options.attach.mutable_config_hash(), ConfigHash(config, model));
  options.num_ranks = RanksPerNode(config);
  options.first_rank = static_cast<int32_t>(config.node) * options.num_ranks;
  options.command = [config](int32_t rank) { return RankCommand(config, config.leader, rank); };
  return options;
}

absl::Status RunUntilSignal(const ServeConfig& config, const ModelPath& model,
                            ProcessEvents* events) {
  ASSIGN_OR_RETURN(NodeAgentOptions options, AgentOptions(config, model));
  LogEvent(spdlog::level::info, "agent of a node",
           {{"leader", config.leader},
            {"ranks", options.num_ranks},
            {"first_rank", options.first_rank},
            {"config_hash", options.attach.config_hash()}});
  NodeAgent agent(std::move(options));
  absl::Status status;
  std::atomic<bool> ended{false};
  std::thread thread([&] {
    status = agent.Run();
    ended = true;
    events->Wake();
  });
  int signal = 0;
  while (signal == 0 && !ended) signal = events->Wait(absl::InfiniteDuration());
  if (signal != 0) LogEvent(spdlog::level::info, "signal", {{"name", strsignal(signal)}});
  agent.Stop();
  thread.join();
  return status;
}

}  // namespace

int RunNode(const ServeConfig& config, const ModelPath& model) {
  ProcessEvents events;
  InitLogging(config.log_format == "json" ? LogFormat::kJson : LogFormat::kText, config.log_level,
              {{"node", config.node}});
  const absl::Status status = RunUntilSignal(config, model, &events);
  const int exit_code = status.ok() ? kServeOk : FailProcess(config, status);
  LogEvent(spdlog::level::info, "stopped", {{"exit_code", exit_code}});
  ShutdownLogging();
  return exit_code;
}

}  // namespace latentd
