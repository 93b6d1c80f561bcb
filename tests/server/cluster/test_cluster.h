#ifndef LATENTD_TESTS_SERVER_CLUSTER_TEST_CLUSTER_H_
#define LATENTD_TESTS_SERVER_CLUSTER_TEST_CLUSTER_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/cluster/cluster_leader.h"
#include "server/cluster/node_control.h"
#include "server/cluster/rank_session.h"
#include "tests/server/cluster/fake_member.h"

namespace latentd {

// Ranks that are threads, each the real RankSession around a FakeMember; what kills one or ends it
// starts it again, as a supervisor would.
class TestRanks final : public NodeControl {
 public:
  struct Options {
    FakeEngineOptions engine;
    std::string version = "1";
    std::string config_hash = "c";
    std::string checkpoint_hash = "w";
    absl::Duration step_time = absl::ZeroDuration();
    bool restart = true;
  };

  TestRanks(const Options& options, FakeFabric* fabric, int port);
  ~TestRanks() override;  // ends all ranks

  void Start(OnRankExit on_exit);
  // As kill -9.
  void Kill(int32_t rank) ABSL_LOCKS_EXCLUDED(mutex_);
  void KillRank(int32_t rank, int32_t pid, const std::string& why) override
      ABSL_LOCKS_EXCLUDED(mutex_);

  int num_kills() const { return num_kills_; }  // by KillRank()
  // The latest status that a session of this rank ended with.
  absl::Status last_exit(int32_t rank) const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Rank {
    std::shared_ptr<RankSession> session;
    std::shared_ptr<std::atomic<bool>> killed;
    absl::Status last_exit;
    std::thread thread;
  };
  void Run(int32_t rank, const OnRankExit& on_exit) ABSL_LOCKS_EXCLUDED(mutex_);

  const Options options_;
  FakeFabric* const fabric_;
  const int port_;
  std::atomic<bool> stopping_{false};
  std::atomic<int> num_kills_{0};
  mutable absl::Mutex mutex_;
  std::vector<Rank> ranks_;  // [world_size]; but for `thread` guarded by mutex_
};

// A leader and its ranks.
struct TestCluster {
  explicit TestCluster(int32_t world_size, ClusterOptions leader_options = {},
                       TestRanks::Options rank_options = {});
  ~TestCluster();

  // Waits until there is a group, of at least this epoch.
  void AwaitEpoch(int64_t epoch) const;

  FakeFabric fabric;
  std::unique_ptr<ClusterLeader> leader;
  std::unique_ptr<TestRanks> ranks;
};

// Fast ones: what takes seconds in a cluster takes a fraction in a test.
ClusterOptions TestOptions(int32_t world_size);

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_CLUSTER_TEST_CLUSTER_H_
