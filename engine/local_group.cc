#include "engine/local_group.h"

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/synchronization/mutex.h"
#include "engine/plan_split.h"
#include "engine/status.h"
#include "engine/step.h"

namespace latentd {
namespace {

// One thread for each rank. They all run the same task, and sleep until the next.
class RankThreads {
 public:
  explicit RankThreads(int num_ranks) : busy_(num_ranks, false) {
    for (int rank = 0; rank < num_ranks; ++rank) {
      threads_.emplace_back([this, rank] { Work(rank); });
    }
  }
  ~RankThreads() {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
      changed_.SignalAll();
    }
    for (std::thread& thread : threads_) thread.join();
  }

  // task(rank) on each rank's thread; returns when all have. Past `deadline` late(busy) is called
  // once, busy [ranks] being those that are still at it.
  void Run(const std::function<void(int)>& task, absl::Time deadline,
           const std::function<void(const std::vector<bool>&)>& late) {
    absl::MutexLock lock(&mutex_);
    task_ = &task;
    ++num_tasks_;
    std::fill(busy_.begin(), busy_.end(), true);
    changed_.SignalAll();
    while (!AllDone()) {
      if (!changed_.WaitWithDeadline(&mutex_, deadline) || AllDone()) continue;
      deadline = absl::InfiniteFuture();
      const std::vector<bool> busy = busy_;
      mutex_.Unlock();
      late(busy);
      mutex_.Lock();
    }
    task_ = nullptr;
  }

 private:
  bool AllDone() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return std::find(busy_.begin(), busy_.end(), true) == busy_.end();
  }

  void Work(int rank) {
    absl::MutexLock lock(&mutex_);
    for (int64_t num_done = 0;; ++num_done) {
      while (!stopping_ && num_tasks_ == num_done) changed_.Wait(&mutex_);
      if (stopping_) return;
      const std::function<void(int)>& task = *task_;
      mutex_.Unlock();
      task(rank);
      mutex_.Lock();
      busy_[rank] = false;
      if (AllDone()) changed_.SignalAll();
    }
  }

  absl::Mutex mutex_;
  absl::CondVar changed_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t num_tasks_ ABSL_GUARDED_BY(mutex_) = 0;
  const std::function<void(int)>* task_ ABSL_GUARDED_BY(mutex_) = nullptr;
  std::vector<bool> busy_ ABSL_GUARDED_BY(mutex_);  // [ranks]
  std::vector<std::thread> threads_;
};

// The error of one rank: the first that is no mere echo of another's, if there is one.
absl::Status ErrorOf(const std::vector<absl::Status>& statuses) {
  absl::Status first;
  for (size_t rank = 0; rank < statuses.size(); ++rank) {
    const absl::Status& status = statuses[rank];
    if (status.ok() || (!first.ok() && absl::IsUnavailable(status))) continue;
    first = absl::Status(status.code(), absl::StrCat("rank ", rank, ": ", status.message()));
    if (!absl::IsUnavailable(status)) break;
  }
  return first;
}

class LocalGroupImpl : public LocalGroup {
 public:
  LocalGroupImpl(std::vector<std::unique_ptr<GroupMember>> members,
                 const LocalGroupOptions& options, const EngineInfo& info)
      : info_(info),
        options_(options),
        members_(std::move(members)),
        statuses_(members_.size()),
        results_(members_.size()),
        threads_(static_cast<int>(members_.size())) {}

  EngineInfo info() const override { return info_; }
  bool lost() const override {
    return std::any_of(members_.begin(), members_.end(),
                       [](const auto& member) { return member->lost(); });
  }

  absl::Status Form() {
    GroupSpec group;
    group.epoch = ++epoch_;
    group.world_size = static_cast<int32_t>(members_.size());
    for (const auto& member : members_) group.addresses.push_back(member->address());
    const absl::Time deadline = absl::Now() + options_.join_timeout;
    RETURN_IF_ERROR(RunAll(deadline, [&](int rank) -> absl::Status {
      if (rank != 0) return absl::OkStatus();
      ASSIGN_OR_RETURN(group.nccl_unique_id, members_[0]->MakeUniqueId());
      return absl::OkStatus();
    }));
    RETURN_IF_ERROR(RunAll(deadline, [&](int rank) {
      GroupSpec mine = group;
      mine.rank = rank;
      return members_[rank]->Join(mine, deadline);
    }));
    formed_ = true;
    return absl::OkStatus();
  }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    RETURN_IF_ERROR(CheckSplit(plan, info_.num_dp_ranks));
    if (!formed_) RETURN_IF_ERROR(Form());
    SplitPlan(plan, info_.num_dp_ranks, &shares_);
    RETURN_IF_ERROR(RunAll(absl::Now() + options_.step_timeout, [&](int rank) {
      absl::StatusOr<StepResult> result = members_[rank]->Execute(shares_[rank]);
      if (result.ok()) results_[rank] = *std::move(result);
      return result.status();
    }));
    return MergeResults(plan, results_);
  }

 private:
  // task(rank) on each rank's thread, ended at `deadline`. After an error the group is no more.
  absl::Status RunAll(absl::Time deadline, const std::function<absl::Status(int)>& task) {
    absl::Status late;
    threads_.Run([&](int rank) { statuses_[rank] = task(rank); }, deadline,
                 [&](const std::vector<bool>& busy) {
                   late = LateError(busy);
                   for (const auto& member : members_) member->AbortGroup(late);
                 });
    const absl::Status status = late.ok() ? ErrorOf(statuses_) : late;
    if (!status.ok()) formed_ = false;
    return status;
  }

  absl::Status LateError(const std::vector<bool>& busy) const {
    std::vector<std::string> ranks;
    for (size_t rank = 0; rank < busy.size(); ++rank) {
      if (!busy[rank]) continue;
      const std::string waiting_in = members_[rank]->waiting_in();
      ranks.push_back(waiting_in.empty() ? absl::StrCat("rank ", rank, " computes")
                                         : absl::StrCat("rank ", rank, " waits in ", waiting_in));
    }
    return absl::DeadlineExceededError(
        absl::StrCat("not done in time: ", absl::StrJoin(ranks, "; ")));
  }

  const EngineInfo info_;
  const LocalGroupOptions options_;
  const std::vector<std::unique_ptr<GroupMember>> members_;  // [ranks]
  int64_t epoch_ = 0;                                        // of the latest forming
  bool formed_ = false;
  std::vector<StepPlan> shares_;        // [ranks]
  std::vector<absl::Status> statuses_;  // [ranks] each one of its rank's thread, while it is busy
  std::vector<StepResult> results_;     // [ranks] likewise
  RankThreads threads_;                 // last: it ends before what its tasks use
};

absl::StatusOr<EngineInfo> InfoOfAll(const std::vector<std::unique_ptr<GroupMember>>& members) {
  if (members.empty()) return absl::InvalidArgumentError("a group of no ranks");
  EngineInfo all = members[0]->info();
  for (size_t rank = 1; rank < members.size(); ++rank) {
    const EngineInfo info = members[rank]->info();
    if (info.vocab_size != all.vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(
          "rank ", rank, ": vocab_size ", info.vocab_size, "; rank 0 has ", all.vocab_size));
    }
    all.num_blocks = std::min(all.num_blocks, info.num_blocks);
    all.max_step_tokens = std::min(all.max_step_tokens, info.max_step_tokens);
    all.max_sequences = std::min(all.max_sequences, info.max_sequences);
    all.max_model_len = std::min(all.max_model_len, info.max_model_len);
  }
  all.num_dp_ranks = static_cast<int32_t>(members.size());
  return all;
}

}  // namespace

absl::StatusOr<std::unique_ptr<LocalGroup>> LocalGroup::Create(
    std::vector<std::unique_ptr<GroupMember>> members, const LocalGroupOptions& options) {
  ASSIGN_OR_RETURN(const EngineInfo info, InfoOfAll(members));
  auto group = std::make_unique<LocalGroupImpl>(std::move(members), options, info);
  RETURN_IF_ERROR(group->Form());
  return group;
}

}  // namespace latentd
