#include "engine/cuda/local_exchange.h"

#include <map>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "engine/cuda/cuda_status.h"
#include "engine/cuda/kernels/exchange.h"
#include "engine/status.h"

namespace latentd {
namespace {

// What the ranks share. Thread-safe.
class Room {
 public:
  explicit Room(int world_size) : offers_(world_size), here_(world_size, false) {}
  int world_size() const { return static_cast<int>(offers_.size()); }

  // Waits until all ranks are at `what`, which is the same for all of them.
  absl::Status Meet(int rank, const std::string& what, absl::Time deadline) {
    absl::MutexLock lock(&mutex_);
    RETURN_IF_ERROR(why_);
    if (num_here_ == 0) what_ = what;
    if (what_ != what) {
      Fail(absl::InternalError(
          absl::StrCat("rank ", rank, " is at ", what, ", the others at ", what_)));
      return why_;
    }
    here_[rank] = true;
    const int64_t meeting = meeting_;
    if (++num_here_ == world_size()) {
      num_here_ = 0;
      here_.assign(here_.size(), false);
      ++meeting_;
      return absl::OkStatus();
    }
    const auto over = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return meeting_ != meeting || !why_.ok();
    };
    if (!mutex_.AwaitWithDeadline(absl::Condition(&over), deadline)) {
      Fail(absl::DeadlineExceededError(
          absl::StrCat(what, ": waited for ranks ", absl::StrJoin(Missing(), ", "))));
    }
    return meeting_ != meeting ? absl::OkStatus() : why_;
  }

  // What a rank shows the others between two meetings.
  void Offer(int rank, const void* data) {
    absl::MutexLock lock(&mutex_);
    offers_[rank] = data;
  }
  std::vector<const void*> offers() const {
    absl::MutexLock lock(&mutex_);
    return offers_;
  }

  void Abort(const absl::Status& why) {
    absl::MutexLock lock(&mutex_);
    Fail(why);
  }
  absl::Status status() const {
    absl::MutexLock lock(&mutex_);
    return why_;
  }
  std::string WaitingIn(int rank) const {
    absl::MutexLock lock(&mutex_);
    if (!here_[rank]) return "";
    return absl::StrCat(what_, " for ranks ", absl::StrJoin(Missing(), ", "));
  }

 private:
  void Fail(const absl::Status& why) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (why_.ok()) why_ = why;
  }
  std::vector<int> Missing() const ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    std::vector<int> missing;
    for (size_t i = 0; i < here_.size(); ++i) {
      if (!here_[i]) missing.push_back(static_cast<int>(i));
    }
    return missing;
  }

  mutable absl::Mutex mutex_;
  std::vector<const void*> offers_ ABSL_GUARDED_BY(mutex_);
  std::vector<bool> here_ ABSL_GUARDED_BY(mutex_);
  std::string what_ ABSL_GUARDED_BY(mutex_);
  int num_here_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t meeting_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status why_ ABSL_GUARDED_BY(mutex_);
};

class LocalExchange : public GpuExchange {
 public:
  LocalExchange(int rank, std::shared_ptr<Room> room) : rank_(rank), room_(std::move(room)) {}
  ~LocalExchange() override {
    room_->Abort(absl::UnavailableError(absl::StrCat("rank ", rank_, " has left the group")));
  }

  absl::Status Form(absl::Time deadline) override { return room_->Meet(rank_, "Form", deadline); }

  absl::Status Dispatch(std::byte* slots, size_t bytes, cudaStream_t stream) override {
    const std::string call = absl::StrCat("Dispatch #", ++num_calls_, " of ", bytes, " bytes");
    RETURN_IF_ERROR(Show(call, slots + rank_ * bytes, stream));
    const std::vector<const void*> own = room_->offers();
    for (int r = 0; r < room_->world_size(); ++r) {
      if (r == rank_) continue;
      RETURN_IF_CUDA_ERROR(
          cudaMemcpyAsync(slots + r * bytes, own[r], bytes, cudaMemcpyDeviceToDevice, stream));
    }
    return Finish(call, stream);
  }

  absl::Status Combine(const __nv_bfloat16* sums, int64_t count, __nv_bfloat16* out,
                       cudaStream_t stream) override {
    const std::string call = absl::StrCat("Combine #", ++num_calls_, " of ", count, " elements");
    RETURN_IF_ERROR(Show(call, sums, stream));
    const std::vector<const void*> sums_of = room_->offers();
    SumPartsArgs args;
    args.num_parts = room_->world_size();
    for (int r = 0; r < args.num_parts; ++r)
      args.parts[r] = static_cast<const __nv_bfloat16*>(sums_of[r]) + rank_ * count;
    args.count = count;
    args.out = out;
    RETURN_IF_CUDA_ERROR(SumParts(args, stream));
    return Finish(call, stream);
  }

  bool capturable() const override { return false; }
  absl::Status Check() override { return room_->status(); }
  void Abort(const absl::Status& why) override { room_->Abort(why); }
  std::string waiting_in() const override { return room_->WaitingIn(rank_); }
  std::string transport() const override { return "local"; }

 private:
  // Returns when all ranks' `data` is written and can be read.
  absl::Status Show(const std::string& call, const void* data, cudaStream_t stream) {
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
    room_->Offer(rank_, data);
    return room_->Meet(rank_, call, absl::InfiniteFuture());
  }
  // Returns when nobody reads this rank's data any more.
  absl::Status Finish(const std::string& call, cudaStream_t stream) {
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream));
    return room_->Meet(rank_, absl::StrCat("the end of ", call), absl::InfiniteFuture());
  }

  const int rank_;
  const std::shared_ptr<Room> room_;
  int64_t num_calls_ = 0;
};

// The rooms of a group, one for each forming.
class Rooms {
 public:
  absl::StatusOr<std::shared_ptr<GpuExchange>> Enter(const GroupSpec& group) {
    if (group.world_size > kMaxSumParts) {
      return absl::InvalidArgumentError(
          absl::StrCat("world_size: ", group.world_size, "; the most is ", kMaxSumParts));
    }
    absl::MutexLock lock(&mutex_);
    std::shared_ptr<Room>& of_epoch = rooms_[group.epoch];
    if (of_epoch == nullptr) of_epoch = std::make_shared<Room>(group.world_size);
    const std::shared_ptr<Room> room = of_epoch;
    while (rooms_.size() > 2) rooms_.erase(rooms_.begin());
    return std::make_shared<LocalExchange>(group.rank, room);
  }

 private:
  absl::Mutex mutex_;
  std::map<int64_t, std::shared_ptr<Room>> rooms_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

ExchangeFactory LocalExchanges() {
  return
      [rooms = std::make_shared<Rooms>()](const GroupSpec& group) { return rooms->Enter(group); };
}

}  // namespace latentd
