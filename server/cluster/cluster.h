#ifndef LATENTD_SERVER_CLUSTER_CLUSTER_H_
#define LATENTD_SERVER_CLUSTER_CLUSTER_H_

#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "server/cluster/cluster_leader.h"
#include "server/cluster/cluster_stats.h"
#include "server/cluster/process_supervisor.h"
#include "server/engine_factory.h"

namespace latentd {

// What a daemon has instead of an engine of its own: the leader of the ranks, and what keeps those
// of its own node running. The engine over it is a RemoteEngine.
class Cluster {
 public:
  // How the rank of this node is started that is to dial `leader_port` of this machine.
  using Command = std::function<ProcessCommand(int leader_port, int32_t rank)>;

  // Listens, starts this node's ranks, and waits for all ranks to load and form a group; those of
  // other nodes as long as it takes. An error of a rank that cannot load is returned.
  static absl::StatusOr<std::unique_ptr<Cluster>> Start(const ClusterOptions& options,
                                                        const Command& command,
                                                        LoadListener* listener);
  // Ends the ranks. REQUIRES: no engine over it computes.
  ~Cluster();

  ClusterLeader* leader() const { return leader_.get(); }
  ClusterStats stats() const { return leader_->stats(); }

 private:
  Cluster() = default;
  absl::Status AwaitLoaded(LoadListener* listener);

  std::unique_ptr<ClusterLeader> leader_;
  std::unique_ptr<ProcessSupervisor> supervisor_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_CLUSTER_H_
