#ifndef LATENTD_ENGINE_CPU_GROUP_TRANSPORT_H_
#define LATENTD_ENGINE_CPU_GROUP_TRANSPORT_H_

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/comm/communicator.h"
#include "engine/group_member.h"

namespace latentd {

// How a CPU rank finds the others of its group: threads of this process, or processes. One rank's;
// it is there for all formings. One thread at a time but where a method says otherwise.
class GroupTransport {
 public:
  virtual ~GroupTransport() = default;

  // This rank's communicator of `group`; blocks until all ranks have theirs, or `deadline`.
  virtual absl::StatusOr<std::unique_ptr<Communicator>> Connect(const GroupSpec& group,
                                                                absl::Time deadline) = 0;

  // Ends the Connect() of the group of `epoch`, under way or about to begin, with `why`. Any
  // thread.
  virtual void Abort(int64_t epoch, const absl::Status& why) = 0;

  // What a Connect() waits for; empty without one. Any thread.
  virtual std::string waiting_in() const = 0;

  // As GroupMember::address(). Any thread.
  virtual std::string address() const = 0;

  // As GroupMember::transport(): local, tcp. Any thread.
  virtual std::string name() const = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_GROUP_TRANSPORT_H_
