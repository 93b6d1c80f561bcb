#ifndef LATENTD_SERVER_CLUSTER_REMOTE_ENGINE_H_
#define LATENTD_SERVER_CLUSTER_REMOTE_ENGINE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "engine/step.h"
#include "grpcpp/support/byte_buffer.h"
#include "server/cluster/cluster_leader.h"

namespace latentd {

// All ranks of a group as one engine: each gets its share of a step, and their results become one.
//
// A step that a rank was lost in fails with ABORTED. One that is planned for the caches of a group
// that is no more, having been lost between two steps, fails with CANCELLED.
class RemoteEngine final : public Engine {
 public:
  // `leader` is not owned. REQUIRES: its first group was formed.
  explicit RemoteEngine(ClusterLeader* leader);

  EngineInfo info() const override { return info_; }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;
  bool ready() const override { return leader_->formed_epoch() != 0; }

 private:
  absl::StatusOr<StepResult> RunStep(int64_t epoch, const StepPlan& plan);
  absl::Status CheckResult(const StepPlan& share, const StepResult& result) const;

  ClusterLeader* const leader_;
  const EngineInfo info_;
  // The group whose caches hold what the caller believes to be there; 0: it believes nothing,
  // having been told that all is lost.
  int64_t cache_epoch_;

  // Used again from step to step.
  std::vector<StepPlan> shares_;     // [world_size]
  std::vector<StepResult> results_;  // [world_size]
};

// A LeaderMessage of a step, with `plan` encoded once, in its place.
grpc::ByteBuffer EncodeStepMessage(int64_t epoch, const StepPlan& plan);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_REMOTE_ENGINE_H_
