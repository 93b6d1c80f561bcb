#ifndef LATENTD_TESTS_SERVER_CLUSTER_FAKE_MEMBER_H_
#define LATENTD_TESTS_SERVER_CLUSTER_FAKE_MEMBER_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/group_member.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {

// What may go wrong with a rank.
enum class Fault {
  kNone,
  kDie,        // its process is gone, before it has computed
  kError,      // an error of the collective
  kOwnError,   // one of its own
  kFewTokens,  // a result with a token less than it must have
  kBadToken,   // a result with a token that is none

  kHang,         // waits until it is told to abort
  kHangForEver,  // does not listen to that either, until its process is killed
  kLost,         // its engine will compute nothing any more
};
inline constexpr int kNumFaults = 9;

// Where the ranks of a test meet, instead of exchanging tensors, and which faults they have. Any
// thread.
class FakeFabric {
 public:
  explicit FakeFabric(int32_t world_size) : world_size_(world_size) {}

  int32_t world_size() const { return world_size_; }

  // The next steps of `rank`, or its next joining of a group, have this fault.
  void InjectInStep(int32_t rank, Fault fault, int times = 1) ABSL_LOCKS_EXCLUDED(mutex_);
  void InjectInJoin(int32_t rank, Fault fault) ABSL_LOCKS_EXCLUDED(mutex_);
  Fault TakeStepFault(int32_t rank) ABSL_LOCKS_EXCLUDED(mutex_);
  Fault TakeJoinFault(int32_t rank) ABSL_LOCKS_EXCLUDED(mutex_);

  // Waits for all ranks of `epoch` to come to this meeting. UNAVAILABLE once `aborted`.
  absl::Status Meet(int64_t epoch, int64_t meeting, const std::atomic<bool>& aborted,
                    absl::Time deadline) ABSL_LOCKS_EXCLUDED(mutex_);

  // Loads of weights so far: a survivor keeps its own.
  std::atomic<int> num_loads{0};

 private:
  const int32_t world_size_;
  absl::Mutex mutex_;
  std::multimap<int32_t, Fault> step_faults_ ABSL_GUARDED_BY(mutex_);
  std::multimap<int32_t, Fault> join_faults_ ABSL_GUARDED_BY(mutex_);
  std::map<std::pair<int64_t, int64_t>, int32_t> present_ ABSL_GUARDED_BY(mutex_);
};

// A FakeEngine as one rank of a group: a wrong block, share or recovery changes its tokens. Each
// joining ruins its cache.
class FakeMember final : public GroupMember {
 public:
  struct Options {
    FakeEngineOptions engine;  // info.num_dp_ranks: the world size
    int32_t rank = 0;
    FakeFabric* fabric = nullptr;
    std::function<void()> die;  // ends the rank's session as if its process were gone
    const std::atomic<bool>* killed = nullptr;  // ends a kHangForEver
    absl::Duration step_time = absl::ZeroDuration();
  };

  explicit FakeMember(Options options);

  EngineInfo info() const override { return options_.engine.info; }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;
  bool lost() const override { return lost_; }
  absl::Status Join(const GroupSpec& group, absl::Time deadline) override;
  void AbortGroup(const absl::Status&) override { aborted_ = true; }
  std::string waiting_in() const override { return waiting_ ? "Meeting for all ranks" : ""; }
  std::string transport() const override { return "fake"; }
  std::string address() const override { return ":1"; }

 private:
  absl::Status Meet(absl::Time deadline);
  // What the rank does in its trouble; OK: it goes on, with a result that is wrong perhaps.
  absl::Status Suffer(Fault fault);

  const Options options_;
  std::unique_ptr<FakeEngine> engine_;
  int64_t epoch_ = 0;  // 0: in no group
  int64_t meeting_ = 0;
  std::atomic<bool> aborted_{false};
  std::atomic<bool> waiting_{false};
  std::atomic<bool> lost_{false};
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_CLUSTER_FAKE_MEMBER_H_
