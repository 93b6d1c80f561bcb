#ifndef LATENTD_SERVER_CLUSTER_RANK_GROUP_H_
#define LATENTD_SERVER_CLUSTER_RANK_GROUP_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/step.h"
#include "latentd/v1/rank.pb.h"
#include "server/cluster/cluster_stats.h"
#include "server/cluster/peer_server.h"

namespace latentd {

struct ClusterOptions {
  std::string listen = "127.0.0.1:0";  // where ranks and agents come in
  int32_t world_size = 1;
  int32_t num_nodes =
      1;  // ranks are dealt out evenly: node n has those from n * world_size / num_nodes
  // What a rank must have too.
  std::string version;
  std::string config_hash;
  std::string checkpoint_hash;

  absl::Duration step_deadline = absl::Minutes(5);
  absl::Duration form_timeout = absl::Minutes(2);
  absl::Duration abort_timeout = absl::Seconds(10);
  absl::Duration heartbeat_interval = absl::Milliseconds(500);
  absl::Duration heartbeat_timeout = absl::Seconds(5);
  // Between the loss of a group and the forming of the next: doubled as long as no step succeeds.
  absl::Duration min_backoff = absl::Milliseconds(100);
  absl::Duration max_backoff = absl::Seconds(5);
  // Steps that may fail on end by an error of one rank's own; then its process is replaced.
  int32_t max_step_errors = 3;
  // Processes of one rank that may be lost before the first forming; then loading has failed.
  int32_t max_early_losses = 5;
};

// How far the ranks are with loading.
struct GroupProgress {
  uint64_t loaded_bytes = 0;  // all ranks
  uint64_t total_bytes = 0;
  std::vector<int32_t> absent;  // ranks
  bool formed = false;
};

// Who of the ranks is there, and the group they form: the leader's books, without threads and
// clocks. One call at a time; ClusterLeader's mutex sees to that. What it sends never blocks.
//
//   absent -> loading -> ready -> forming -> formed
//                          ^         |         |
//                          +------ aborting <--+      when one is lost or a step fails
//
// A group is formed when all ranks are ready: an epoch. When a rank is lost, or a step or a forming
// fails or takes too long, the epoch is given up: the others are told to abort, and the next is
// formed when all are ready again. A rank that is lost has to come in again as a new process; the
// others keep theirs, and their weights.
class RankGroup {
 public:
  // `kill` ends the process of a rank, which is then started again; it must not block.
  RankGroup(const ClusterOptions& options,
            std::function<void(const ClusterStats::Rank& where, int32_t rank, int32_t pid,
                               const std::string& why)>
                kill);

  // ---- what happens ----

  // A process of a rank comes in. OK: it is welcomed; else what its stream is to end with.
  absl::Status Join(const v1::RankJoin& join, std::shared_ptr<PeerStream> stream, absl::Time now);
  void OnMessage(int32_t rank, const v1::RankMessage& message, absl::Time now);
  // Its stream has ended.
  void OnGone(int32_t rank, const std::string& how, absl::Time now);
  // Its process has, as the one that keeps it running saw, which may be before or after that; the
  // next may even be there. `rank` may be anything.
  void OnProcessExited(int32_t rank, int32_t pid, const std::string& how, absl::Time now);
  // It sent what cannot be.
  void OnGarbage(int32_t rank, const std::string& what, absl::Time now);
  // Judges what takes too long, and forms a group when it is time.
  void Tick(absl::Time now);
  // Tells all ranks that are there to exit.
  void Shutdown();

  // ---- steps ----

  // A step begins: its results are awaited from now on. False when there is no group of `epoch`.
  // results [world_size] is filled by OnMessage() until the step ends.
  bool BeginStep(int64_t epoch, int64_t step, std::vector<StepResult>* results,
                 std::vector<std::shared_ptr<PeerStream>>* streams);
  // All results are there, or the step has failed.
  bool step_done() const { return !step_ || step_->num_missing == 0 || !step_->status.ok(); }
  // The step has taken longer than it may: the epoch is given up.
  void OnStepDeadline(absl::Time now);
  // OK, or ABORTED.
  absl::Status EndStep();

  // ---- questions ----

  int32_t world_size() const { return options_.world_size; }
  int64_t formed_epoch() const { return formed_ ? epoch_ : 0; }  // 0: no group now
  // Of all ranks together; those of the first group, for ever.
  const std::optional<EngineInfo>& info() const { return info_; }
  // Not OK once the first forming is out of reach.
  const absl::Status& load_status() const { return load_status_; }
  bool Holds(int32_t rank, const PeerStream* stream) const;
  int32_t pid(int32_t rank) const { return members_[rank].pid; }
  GroupProgress progress() const;
  ClusterStats stats() const;

 private:
  struct Member {
    RankState state = RankState::kAbsent;
    std::shared_ptr<PeerStream> stream;
    int32_t node = 0;
    int32_t pid = 0;
    std::string host;  // as it calls itself
    std::string address;
    std::string unique_id;  // for the next forming
    v1::EngineLimits limits;
    uint64_t loaded_bytes = 0;
    uint64_t total_bytes = 0;
    absl::Time last_heard;
    absl::Time abort_deadline;
    std::string waiting_in;  // as the last heartbeat said
    std::string transport;
    int32_t num_early_losses = 0;
    int32_t num_step_errors = 0;  // its own, since a step has succeeded
  };
  struct Step {
    int64_t number = 0;
    std::vector<StepResult>* results = nullptr;
    std::vector<bool> has;  // [world_size]
    int32_t num_missing = 0;
    absl::Status status;
  };

  absl::Status CheckJoin(const v1::RankJoin& join) const;
  void OnReady(int32_t rank, const v1::RankReady& ready, absl::Time now);
  void OnFormed(int32_t rank, const v1::Formed& formed, absl::Time now);
  void OnStepDone(int32_t rank, const v1::StepDone& done, absl::Time now);
  void OnStepError(int32_t rank, const absl::Status& status, absl::Time now);
  void OnAborted(int32_t rank, const v1::Aborted& aborted);
  void OnFailed(int32_t rank, const absl::Status& why, absl::Time now);
  // The rank's process is not reckoned with any more; `kill` where it may still run.
  void Lose(int32_t rank, LossReason reason, const std::string& why, bool kill, absl::Time now);
  // Before the first forming: a rank that is lost over and over will not load.
  void CountEarlyLoss(int32_t rank, const std::string& how);
  void GiveUpEpoch(LossReason reason, const std::string& why, absl::Time now);
  void Form(absl::Time now);
  void OnAllFormed(absl::Time now);
  std::string Waiting(RankState state) const;  // "rank 3 computes; rank 5 waits in ..."

  const ClusterOptions options_;
  const std::function<void(const ClusterStats::Rank&, int32_t, int32_t, const std::string&)> kill_;
  std::vector<Member> members_;  // [world_size]
  std::optional<EngineInfo> info_;
  absl::Status load_status_;

  int64_t epoch_ = 0;
  bool forming_ = false;
  bool formed_ = false;
  absl::Time form_deadline_;
  absl::Time form_not_before_ = absl::InfinitePast();
  absl::Time since_ = absl::InfinitePast();  // when the group was lost; InfinitePast: never was one
  absl::Duration backoff_;
  std::optional<Step> step_;
  bool shut_down_ = false;
  ClusterStats stats_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_RANK_GROUP_H_
