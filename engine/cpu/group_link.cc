#include "engine/cpu/group_link.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {

absl::Status GroupLink::Join(const GroupSpec& group, absl::Time deadline) {
  if (group.rank != placement_.rank || group.world_size != placement_.world_size) {
    return absl::InvalidArgumentError(absl::StrCat(
        "group ", group.epoch, " has this rank as ", group.rank, " of ", group.world_size,
        "; its weights are those of ", placement_.rank, " of ", placement_.world_size));
  }
  std::shared_ptr<Communicator> before;
  {
    absl::MutexLock lock(&mutex_);
    before = std::exchange(communicator_, nullptr);
    joining_ = group.epoch;
    join_abort_ = absl::OkStatus();
  }
  if (before != nullptr) {
    before->Abort(absl::UnavailableError(
        absl::StrCat("rank ", group.rank, " has left for group ", group.epoch)));
    before.reset();
  }
  absl::StatusOr<std::unique_ptr<Communicator>> made = transport_->Connect(group, deadline);

  absl::MutexLock lock(&mutex_);
  joining_.reset();
  failure_ = made.ok() ? join_abort_ : made.status();
  if (made.ok()) communicator_ = *std::move(made);
  if (!join_abort_.ok() && communicator_ != nullptr) communicator_->Abort(join_abort_);
  return failure_;
}

absl::StatusOr<Communicator*> GroupLink::communicator() {
  absl::MutexLock lock(&mutex_);
  if (!failure_.ok()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the group has failed and is to be joined again: ", failure_.ToString()));
  }
  if (communicator_ == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("rank ", placement_.rank, " is in no group yet"));
  }
  return communicator_.get();
}

void GroupLink::Fail(const absl::Status& error) {
  failure_ = error;
  Abort(error);
}

void GroupLink::Abort(const absl::Status& why) {
  std::shared_ptr<Communicator> communicator;
  std::optional<int64_t> joining;
  {
    absl::MutexLock lock(&mutex_);
    joining = joining_;
    if (joining && join_abort_.ok()) join_abort_ = why;
    communicator = communicator_;
  }
  if (joining) transport_->Abort(*joining, why);
  if (communicator != nullptr) communicator->Abort(why);
}

std::string GroupLink::waiting_in() const {
  std::shared_ptr<Communicator> communicator;
  {
    absl::MutexLock lock(&mutex_);
    if (joining_) return transport_->waiting_in();
    communicator = communicator_;
  }
  return communicator != nullptr ? communicator->waiting_in() : "";
}

}  // namespace latentd
