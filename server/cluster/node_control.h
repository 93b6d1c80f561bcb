#ifndef LATENTD_SERVER_CLUSTER_NODE_CONTROL_H_
#define LATENTD_SERVER_CLUSTER_NODE_CONTROL_H_

#include <cstdint>
#include <functional>
#include <string>

namespace latentd {

// Who keeps the ranks of one node running: the supervisor of the leader's own node, or a node's
// agent at the other end of RankService.Attach. It starts a rank that exits again, with backoff.
class NodeControl {
 public:
  virtual ~NodeControl() = default;

  // SIGKILL, which ends a stopped process too; the rank is then started again. No-op unless `rank`
  // runs as process `pid`. Any thread; never blocks.
  virtual void KillRank(int32_t rank, int32_t pid, const std::string& why) = 0;
};

// How it tells the leader that a rank's process is gone: "exit code 1", "signal 9 (Killed)". The
// leader's is ClusterLeader::OnRankExited(): any thread, never blocks.
using OnRankExit = std::function<void(int32_t rank, int32_t pid, const std::string& how)>;

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_NODE_CONTROL_H_
