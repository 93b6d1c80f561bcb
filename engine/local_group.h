#ifndef LATENTD_ENGINE_LOCAL_GROUP_H_
#define LATENTD_ENGINE_LOCAL_GROUP_H_

#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "engine/group_member.h"

namespace latentd {

struct LocalGroupOptions {
  absl::Duration join_timeout = absl::Minutes(1);
  // A step that takes longer fails with DEADLINE_EXCEEDED, which says what each rank waits in.
  // What a rank computes is not cut short.
  absl::Duration step_timeout = absl::Minutes(5);
};

// All ranks of a group as threads of this process, as one engine: it splits the plan, runs every
// rank's share on that rank's thread, and merges the results.
//
// An error is one rank's, whose number it names: the first one's that does not merely follow from
// another's (UNAVAILABLE), if there is such. After it the next step forms the group anew.
class LocalGroup : public Engine {
 public:
  // Forms the group of `members` [world_size], in the order of their ranks: each was made for its
  // rank, and with what it finds the others by. INVALID_ARGUMENT when they are of different models.
  static absl::StatusOr<std::unique_ptr<LocalGroup>> Create(
      std::vector<std::unique_ptr<GroupMember>> members, const LocalGroupOptions& options = {});
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_LOCAL_GROUP_H_
