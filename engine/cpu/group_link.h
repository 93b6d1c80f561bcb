#ifndef LATENTD_ENGINE_CPU_GROUP_LINK_H_
#define LATENTD_ENGINE_CPU_GROUP_LINK_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/comm/communicator.h"
#include "engine/cpu/group_transport.h"
#include "engine/group_member.h"
#include "engine/model/placement.h"

namespace latentd {

// What ties one CPU rank to its group: none yet, the group of now, or one that has failed and is to
// be joined anew. The Execute() thread's, but where a method says otherwise.
class GroupLink {
 public:
  GroupLink(const Placement& placement, std::unique_ptr<GroupTransport> transport)
      : placement_(placement), transport_(std::move(transport)) {}

  // As GroupMember::Join(). INVALID_ARGUMENT when `group` has another place for this rank.
  absl::Status Join(const GroupSpec& group, absl::Time deadline);

  // The group's, until the next Join(); FAILED_PRECONDITION says why there is none.
  absl::StatusOr<Communicator*> communicator();

  // After the error of a collective: the group is no more, for the peers neither.
  void Fail(const absl::Status& error);

  // As GroupMember's. Any thread.
  void Abort(const absl::Status& why);
  std::string waiting_in() const;
  std::string address() const { return transport_->address(); }
  std::string transport() const { return transport_->name(); }

 private:
  const Placement placement_;
  const std::unique_ptr<GroupTransport> transport_;
  absl::Status failure_;  // of the group of now

  mutable absl::Mutex mutex_;
  std::optional<int64_t> joining_ ABSL_GUARDED_BY(mutex_);  // the epoch
  absl::Status join_abort_ ABSL_GUARDED_BY(mutex_);         // of the Join() under way
  std::shared_ptr<Communicator> communicator_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_GROUP_LINK_H_
