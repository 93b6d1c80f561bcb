#include "engine/comm/local_communicator.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "engine/comm/call.h"
#include "engine/status.h"

namespace latentd {
namespace {

// One rank's side of a call, in its own frame until the call returns.
struct Part {
  Call call;
  size_t size = 0;  // bytes that one rank gives one other; 0 in AllToAll
  const std::byte* in = nullptr;
  absl::Span<const absl::Span<const std::byte>> to = {};
  absl::Span<const absl::Span<std::byte>> from = {};
};

void Copy(const std::byte* from, absl::Span<std::byte> to) {
  if (!to.empty()) std::memcpy(to.data(), from, to.size());
}

// Where the ranks meet. A call has two phases: all ranks come and show their parts, then all read
// them. No rank is ever more than one phase ahead of another.
class Hub {
 public:
  Hub(int world_size, absl::Duration call_timeout)
      : world_size_(world_size), call_timeout_(call_timeout), parts_(world_size) {}

  int world_size() const { return world_size_; }
  const Part& part(int rank) const { return *parts_[rank]; }  // within `read` alone

  // Shows `part`, and calls `read` once all ranks have shown theirs.
  absl::Status Run(int rank, const Part& part, absl::FunctionRef<void()> read) {
    absl::MutexLock lock(&mutex_);
    const uint64_t meeting = num_met_ + 1;
    if (error_.ok()) Arrive(rank, part);
    const absl::Time deadline = absl::Now() + call_timeout_;
    while (error_.ok() && num_met_ < meeting) {
      if (changed_.WaitWithDeadline(&mutex_, deadline) && error_.ok() && num_met_ < meeting) {
        Fail(absl::DeadlineExceededError(
            absl::StrCat("not there within ", absl::FormatDuration(call_timeout_))));
      }
    }
    if (num_met_ < meeting) return CallError(part.call, Missing(), error_);
    // The peers read this rank's buffers from here on: whatever happens, it stays until they have.
    mutex_.Unlock();
    read();
    mutex_.Lock();
    if (--num_reading_ == 0) {
      std::fill(parts_.begin(), parts_.end(), nullptr);
      num_read_ = meeting;
      changed_.SignalAll();
    }
    while (num_read_ < meeting) changed_.Wait(&mutex_);
    return absl::OkStatus();
  }

  void End(const absl::Status& error) {
    absl::MutexLock lock(&mutex_);
    Fail(error);
  }

  // Empty where the rank waits for nobody.
  std::string WaitingIn(int rank) const {
    absl::MutexLock lock(&mutex_);
    // While all read, nobody is waited for longer than that takes.
    if (parts_[rank] == nullptr || num_met_ > num_read_ || !error_.ok()) return "";
    return WaitText(parts_[rank]->call, Missing());
  }

 private:
  void Arrive(int rank, const Part& part) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto first = std::find_if(parts_.begin(), parts_.end(), [](auto* p) { return p; });
    if (first != parts_.end()) {
      const std::string who = absl::StrCat("rank ", rank, " ");
      const std::string other = absl::StrCat(", rank ", first - parts_.begin(), " ");
      if ((*first)->call.kind != part.call.kind) {
        Fail(absl::InternalError(
            absl::StrCat(who, "calls ", CallText(part.call), other, CallText((*first)->call))));
      } else if ((*first)->size != part.size) {
        Fail(absl::InternalError(
            absl::StrCat(who, "gives ", part.size, " bytes", other, (*first)->size, " bytes")));
      }
    }
    parts_[rank] = &part;
    if (std::find(parts_.begin(), parts_.end(), nullptr) != parts_.end()) return;
    if (part.call.kind == CallKind::kAllToAll) CheckAllToAll();
    if (!error_.ok()) return;
    ++num_met_;
    num_reading_ = world_size_;
    changed_.SignalAll();
  }

  void CheckAllToAll() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (int giver = 0; giver < world_size_; ++giver) {
      for (int taker = 0; taker < world_size_; ++taker) {
        const size_t given = parts_[giver]->to[taker].size();
        const size_t taken = parts_[taker]->from[giver].size();
        if (given == taken) continue;
        Fail(absl::InternalError(absl::StrCat("rank ", giver, " gives rank ", taker, " ", given,
                                              " bytes, which takes ", taken)));
      }
    }
  }

  // The first error counts. Those who read already are not disturbed.
  void Fail(const absl::Status& error) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (!error_.ok()) return;
    error_ = error;
    changed_.SignalAll();
  }

  std::vector<int> Missing() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    std::vector<int> ranks;
    for (int rank = 0; rank < world_size_; ++rank) {
      if (parts_[rank] == nullptr) ranks.push_back(rank);
    }
    return ranks;
  }

  const int world_size_;
  const absl::Duration call_timeout_;

  mutable absl::Mutex mutex_;
  absl::CondVar changed_;
  // Of the call under way; null: not there yet. Constant while ranks read.
  std::vector<const Part*> parts_;
  uint64_t num_met_ ABSL_GUARDED_BY(mutex_) = 0;   // calls to which all came
  uint64_t num_read_ ABSL_GUARDED_BY(mutex_) = 0;  // calls that are over
  int num_reading_ ABSL_GUARDED_BY(mutex_) = 0;    // ranks
  absl::Status error_ ABSL_GUARDED_BY(mutex_);
};

class LocalCommunicator : public Communicator {
 public:
  LocalCommunicator(std::shared_ptr<Hub> hub, int rank) : hub_(std::move(hub)), rank_(rank) {}
  ~LocalCommunicator() override {
    hub_->End(absl::UnavailableError(absl::StrCat("rank ", rank_, " has left the group")));
  }

  int rank() const override { return rank_; }
  int world_size() const override { return hub_->world_size(); }

  absl::Status AllGather(absl::Span<const std::byte> in, absl::Span<std::byte> out) override {
    const bool fits = out.size() == in.size() * world_size();
    Part part{.call = Next(CallKind::kAllGather), .size = in.size(), .in = in.data()};
    return Run(fits, part, [&] {
      for (int r = 0; r < world_size(); ++r) {
        Copy(hub_->part(r).in, out.subspan(r * in.size(), in.size()));
      }
    });
  }

  absl::Status AllToAll(absl::Span<const absl::Span<const std::byte>> to,
                        absl::Span<const absl::Span<std::byte>> from) override {
    const size_t n = world_size();
    Part part{.call = Next(CallKind::kAllToAll), .to = to, .from = from};
    return Run(to.size() == n && from.size() == n, part, [&] {
      for (size_t r = 0; r < n; ++r) {
        Copy(hub_->part(static_cast<int>(r)).to[rank_].data(), from[r]);
      }
    });
  }

  absl::Status ReduceScatter(absl::Span<const float> in, absl::Span<float> out) override {
    const bool fits = in.size() == out.size() * world_size();
    const size_t n = out.size();
    Part part{.call = Next(CallKind::kReduceScatter),
              .size = n * sizeof(float),
              .in = reinterpret_cast<const std::byte*>(in.data())};
    return Run(fits, part, [&] {
      for (int r = 0; r < world_size(); ++r) {
        const float* of_r = reinterpret_cast<const float*>(hub_->part(r).in) + rank_ * n;
        if (r == 0) {
          std::copy_n(of_r, n, out.begin());
        } else {
          AddTo(absl::MakeConstSpan(of_r, n), out);
        }
      }
    });
  }

  absl::Status Barrier() override {
    return Run(true, {.call = Next(CallKind::kBarrier)}, [] {});
  }

  void Abort(const absl::Status& why) override { hub_->End(AbortError(why)); }

  std::string waiting_in() const override { return hub_->WaitingIn(rank_); }

 private:
  Call Next(CallKind kind) { return {.kind = kind, .number = ++num_calls_}; }

  absl::Status Run(bool fits, const Part& part, absl::FunctionRef<void()> read) {
    if (!error_.ok()) return error_;
    if (!fits) {
      hub_->End(absl::InternalError(absl::StrCat(
          "rank ", rank_, " gives buffers whose sizes do not fit to ", CallText(part.call))));
    }
    error_ = hub_->Run(rank_, part, read);
    return error_;
  }

  const std::shared_ptr<Hub> hub_;
  const int rank_;
  // Of the thread that calls.
  uint64_t num_calls_ = 0;
  absl::Status error_;  // of the call that failed
};

}  // namespace

std::vector<std::unique_ptr<Communicator>> MakeLocalCommunicators(int world_size,
                                                                  absl::Duration call_timeout) {
  const auto hub = std::make_shared<Hub>(world_size, call_timeout);
  std::vector<std::unique_ptr<Communicator>> communicators;
  communicators.reserve(world_size);
  for (int rank = 0; rank < world_size; ++rank) {
    communicators.push_back(std::make_unique<LocalCommunicator>(hub, rank));
  }
  return communicators;
}

}  // namespace latentd
