#ifndef LATENTD_ENGINE_GROUP_MEMBER_H_
#define LATENTD_ENGINE_GROUP_MEMBER_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"

namespace latentd {

// One forming of an expert-parallel group: who is in it and how its ranks find each other.
struct GroupSpec {
  int64_t epoch = 0;  // counts the formings; ranks of different epochs never talk to each other
  int32_t rank = 0;
  int32_t world_size = 1;
  std::vector<std::string> addresses;  // [world_size] "host:port" of each rank's tensors; CPU ranks
  std::string nccl_unique_id;          // 128 bytes, made by rank 0; GPU ranks
};

// An engine that is one rank of a group. It keeps its weights from one forming to the next.
//
// Execute() takes this rank's share of a plan (SplitPlan), empty ones too: every rank runs every
// step, and every collective of it. Before the first Join(), and after an error of a collective
// until the next one, it fails with FAILED_PRECONDITION.
class GroupMember : public Engine {
 public:
  // Leaves the group of before, if any, and joins this one; blocks until all ranks have, or
  // `deadline`. The contents of the cache are undefined afterwards. Called by Execute()'s thread.
  virtual absl::Status Join(const GroupSpec& group, absl::Time deadline) = 0;

  // Ends what waits for the group, an Execute() or a Join() under way, with `why`. Any thread.
  virtual void AbortGroup(const absl::Status& why) = 0;

  // What it waits in now, for whom; empty while it computes. Any thread.
  virtual std::string waiting_in() const = 0;

  // What ranks whose GroupSpec has an nccl_unique_id find each other by; a new one for each
  // forming. Asked of rank 0, between formings, by Execute()'s thread. Empty where addresses do
  // that.
  virtual absl::StatusOr<std::string> MakeUniqueId() { return std::string(); }

  // What carries the tensors of the group of now: local, tcp, NVLink, InfiniBand, socket.
  // Execute()'s thread.
  virtual std::string transport() const { return ""; }

  // What has to be said loudly about that transport; empty when nothing has. Execute()'s thread.
  virtual std::string transport_warning() const { return ""; }

  // "host:port" at which its peers reach it; empty where the group is formed otherwise. Any thread.
  virtual std::string address() const = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_GROUP_MEMBER_H_
