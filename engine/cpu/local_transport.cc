#include "engine/cpu/local_transport.h"

#include <cstdint>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "engine/comm/call.h"
#include "engine/comm/local_communicator.h"

namespace latentd {
namespace {

// Where the ranks meet to form a group. One forming at a time: a later one ends the one before.
class Meeting {
 public:
  Meeting(int world_size, absl::Duration call_timeout)
      : world_size_(world_size), call_timeout_(call_timeout) {}

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(int rank, const GroupSpec& group,
                                                        absl::Time deadline) {
    if (group.world_size != world_size_ || group.rank != rank) {
      return absl::InvalidArgumentError(absl::StrCat("group ", group.epoch, ": rank ", group.rank,
                                                     " of ", group.world_size, "; it is rank ",
                                                     rank, " of ", world_size_));
    }
    absl::MutexLock lock(&mutex_);
    Begin(group.epoch);
    if (epoch_ != group.epoch) return Superseded(group.epoch);
    if (there_[rank]) {
      return absl::AlreadyExistsError(
          absl::StrCat("group ", epoch_, ": rank ", rank, " has joined it before"));
    }
    there_[rank] = true;
    if (Missing().empty()) changed_.SignalAll();
    while (epoch_ == group.epoch && error_.ok() && !Missing().empty()) {
      const bool late = changed_.WaitWithDeadline(&mutex_, deadline);
      if (late && epoch_ == group.epoch && !Missing().empty()) {
        Fail(absl::DeadlineExceededError(absl::StrCat(WaitText(), ": not there in time")));
      }
    }
    if (epoch_ != group.epoch) return Superseded(group.epoch);
    if (!error_.ok()) return error_;
    return std::move(communicators_[rank]);
  }

  void Abort(int64_t epoch, const absl::Status& why) {
    absl::MutexLock lock(&mutex_);
    Begin(epoch);
    if (epoch_ == epoch && !Missing().empty()) {
      Fail(absl::UnavailableError(absl::StrCat(WaitText(), ": aborted: ", why.message())));
    }
  }

  std::string WaitingIn(int rank) const {
    absl::MutexLock lock(&mutex_);
    const bool waits = epoch_ > kNone && there_[rank] && error_.ok() && !Missing().empty();
    return waits ? WaitText() : "";
  }

 private:
  static constexpr int64_t kNone = -1;

  void Begin(int64_t epoch) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (epoch <= epoch_) return;
    epoch_ = epoch;
    error_ = absl::OkStatus();
    there_.assign(world_size_, false);
    communicators_ = MakeLocalCommunicators(world_size_, call_timeout_);
    changed_.SignalAll();
  }

  // The first error counts, and counts for all.
  void Fail(const absl::Status& error) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!error_.ok()) return;
    error_ = error;
    changed_.SignalAll();
  }

  std::vector<int> Missing() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    std::vector<int> ranks;
    for (int rank = 0; rank < world_size_; ++rank) {
      if (!there_[rank]) ranks.push_back(rank);
    }
    return ranks;
  }
  std::string WaitText() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return absl::StrCat("Join #", epoch_, " for ", RanksText(Missing()));
  }
  absl::Status Superseded(int64_t epoch) const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return absl::UnavailableError(
        absl::StrCat("group ", epoch, " is no more: the ranks form group ", epoch_));
  }

  const int world_size_;
  const absl::Duration call_timeout_;

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  int64_t epoch_ ABSL_GUARDED_BY(mutex_) = kNone;
  absl::Status error_ ABSL_GUARDED_BY(mutex_);
  std::vector<bool> there_ ABSL_GUARDED_BY(mutex_);  // [world_size]
  // [world_size]; null once its rank has it
  std::vector<std::unique_ptr<Communicator>> communicators_ ABSL_GUARDED_BY(mutex_);
};

class LocalTransport : public GroupTransport {
 public:
  LocalTransport(std::shared_ptr<Meeting> meeting, int rank)
      : meeting_(std::move(meeting)), rank_(rank) {}

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(const GroupSpec& group,
                                                        absl::Time deadline) override {
    return meeting_->Connect(rank_, group, deadline);
  }
  void Abort(int64_t epoch, const absl::Status& why) override { meeting_->Abort(epoch, why); }
  std::string waiting_in() const override { return meeting_->WaitingIn(rank_); }
  std::string address() const override { return ""; }
  std::string name() const override { return "local"; }

 private:
  const std::shared_ptr<Meeting> meeting_;
  const int rank_;
};

}  // namespace

std::vector<std::unique_ptr<GroupTransport>> MakeLocalTransports(int world_size,
                                                                 absl::Duration call_timeout) {
  const auto meeting = std::make_shared<Meeting>(world_size, call_timeout);
  std::vector<std::unique_ptr<GroupTransport>> transports;
  transports.reserve(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    transports.push_back(std::make_unique<LocalTransport>(meeting, rank));
  }
  return transports;
}

}  // namespace latentd
