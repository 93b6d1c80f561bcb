#include "server/cluster/cluster.h"

#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/log.h"

namespace latentd {
namespace {

constexpr absl::Duration kLookInterval = absl::Milliseconds(100);
constexpr absl::Duration kTellInterval = absl::Seconds(10);
// From being told to exit: a rank first frees its engine.
constexpr absl::Duration kExitGrace = absl::Seconds(5);

}  // namespace

absl::StatusOr<std::unique_ptr<Cluster>> Cluster::Start(const ClusterOptions& options,
                                                        const Command& command,
                                                        LoadListener* listener) {
  auto cluster = std::unique_ptr<Cluster>(new Cluster);
  ASSIGN_OR_RETURN(cluster->leader_, ClusterLeader::Start(options));
  ClusterLeader* leader = cluster->leader_.get();
  cluster->supervisor_ = std::make_unique<ProcessSupervisor>(ProcessSupervisor::Options{
      .command = [command, port = leader->port()](int32_t rank) { return command(port, rank); },
      .on_exit = [leader](int32_t rank, int32_t pid,
                          const std::string& how) { leader->OnRankExited(rank, pid, how); }});
  leader->SetLocalNode(cluster->supervisor_.get());
  std::vector<int32_t> ranks(options.world_size / options.num_nodes);
  std::iota(ranks.begin(), ranks.end(), 0);
  cluster->supervisor_->Start(ranks);
  RETURN_IF_ERROR(cluster->AwaitLoaded(listener));
  return cluster;
}

absl::Status Cluster::AwaitLoaded(LoadListener* listener) {
  uint64_t loaded_bytes = 0;
  absl::Time next_told = absl::Now() + kTellInterval;
  while (true) {
    ASSIGN_OR_RETURN(const bool formed, leader_->AwaitGroup(kLookInterval));
    const GroupProgress progress = leader_->progress();
    if (progress.loaded_bytes != loaded_bytes) {
      loaded_bytes = progress.loaded_bytes;
      listener->OnProgress(progress.loaded_bytes, progress.total_bytes);
    } else if (!progress.absent.empty()) {
      listener->OnWaiting();
    }
    if (formed) return absl::OkStatus();
    if (!progress.absent.empty() && absl::Now() >= next_told) {
      next_told = absl::Now() + kTellInterval;
      LogEvent(spdlog::level::info, "waiting for ranks",
               {{"ranks", absl::StrJoin(progress.absent, ",")}});
    }
  }
}

Cluster::~Cluster() {
  if (supervisor_ == nullptr) return;
  leader_->SetLocalNode(nullptr);
  leader_->Shutdown();
  supervisor_->Stop(kExitGrace);
  leader_.reset();
}

}  // namespace latentd
