#ifndef LATENTD_SERVER_CLUSTER_CLUSTER_LEADER_H_
#define LATENTD_SERVER_CLUSTER_CLUSTER_LEADER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/step.h"
#include "server/cluster/cluster_stats.h"
#include "server/cluster/node_control.h"
#include "server/cluster/peer_server.h"
#include "server/cluster/rank_group.h"

namespace latentd {

// The leader's side of RankService: takes in ranks and agents, keeps the group formed (RankGroup),
// and hands out steps. One thread of its own serves all peers.
//
// Any thread, but where a method says otherwise.
class ClusterLeader {
 public:
  // Listens. Ranks that come in are taken from then on.
  static absl::StatusOr<std::unique_ptr<ClusterLeader>> Start(const ClusterOptions& options);
  // Shutdown(), and ends all streams.
  // REQUIRES: no RunStep() is under way.
  ~ClusterLeader();

  // Tells ranks and agents to exit; no group is formed any more.
  void Shutdown() ABSL_LOCKS_EXCLUDED(mutex_);

  int port() const { return server_->port(); }

  // Who keeps the ranks of node 0 running; nullptr ends that. Must outlive the leader or be taken
  // back.
  void SetLocalNode(NodeControl* node) ABSL_LOCKS_EXCLUDED(mutex_);
  // For OnRankExit of the same. Of other nodes their agents tell.
  void OnRankExited(int32_t rank, int32_t pid, const std::string& how) ABSL_LOCKS_EXCLUDED(mutex_);

  // Waits until the group is formed, or so long. True: it is; an error: it never will be.
  absl::StatusOr<bool> AwaitGroup(absl::Duration timeout) ABSL_LOCKS_EXCLUDED(mutex_);

  // Of all ranks together: the least of each limit. Constant once the first group was formed.
  // REQUIRES: it was.
  EngineInfo info() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Of the group there is now; 0: there is none.
  int64_t formed_epoch() const { return formed_epoch_; }
  GroupProgress progress() const ABSL_LOCKS_EXCLUDED(mutex_);
  ClusterStats stats() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Sends each rank its message, and waits for all results. ABORTED when there is no group of this
  // epoch, or none any more when the step ends: why. One call at a time.
  //   messages  [world_size]
  //   results   [world_size]; overwritten
  absl::Status RunStep(int64_t epoch, int64_t step, std::vector<grpc::ByteBuffer> messages,
                       std::vector<StepResult>* results) ABSL_LOCKS_EXCLUDED(mutex_);
  // The results of a rank in the latest step cannot be. The group is given up, the rank killed.
  void RefuseResult(int32_t rank, const std::string& what) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  class Ranks;
  class Nodes;

  explicit ClusterLeader(const ClusterOptions& options);
  void OnTick() ABSL_LOCKS_EXCLUDED(mutex_);
  // After whatever may have changed the group.
  void Publish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void KillRank(int32_t node, int32_t rank, int32_t pid, const std::string& why)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const ClusterOptions options_;
  mutable absl::Mutex mutex_;
  absl::CondVar changed_;  // the group, or the step is done
  std::unique_ptr<RankGroup> group_ ABSL_GUARDED_BY(mutex_);
  NodeControl* local_node_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::unique_ptr<Ranks> ranks_;
  std::unique_ptr<Nodes> nodes_;
  std::atomic<int64_t> formed_epoch_{0};
  std::unique_ptr<PeerServer> server_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_CLUSTER_LEADER_H_
