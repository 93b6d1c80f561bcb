// A leader and ranks that fail in every way: the tokens are those of a faultless run.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "engine/status.h"
#include "scheduler/engine_core.h"
#include "server/cluster/remote_engine.h"
#include "tests/scheduler/engine_core_fixture.h"
#include "tests/scheduler/fake_engine.h"
#include "tests/server/cluster/test_cluster.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

FakeEngineOptions SmallEngine() {
  FakeEngineOptions options;
  options.info = {.num_blocks = 64,
                  .num_dp_ranks = 1,
                  .max_step_tokens = 256,
                  .max_sequences = 16,
                  .max_model_len = 1024,
                  .vocab_size = 1000};
  return options;
}

// A cluster under a scheduler.
class Served {
 public:
  explicit Served(int32_t world_size, ClusterOptions options = {}, int32_t max_recoveries = 1000,
                  absl::Duration step_time = absl::ZeroDuration())
      : cluster_(world_size, std::move(options),
                 {.engine = SmallEngine(), .step_time = step_time}) {
    const absl::StatusOr<bool> formed = cluster_.leader->AwaitGroup(absl::Seconds(60));
    LATENTD_CHECK(formed.ok() && *formed);
    engine_ = std::make_unique<RemoteEngine>(cluster_.leader.get());
    core_ = std::make_unique<EngineCore>(
        SchedulerConfig{
            .max_step_tokens = 256, .max_running = 16, .max_recoveries = max_recoveries},
        engine_.get(), log_.callbacks());
  }
  ~Served() { core_->Stop(); }

  void Submit(RequestId id, int num_prompt, int num_new) {
    requests_.push_back(MakeRequest(id, num_prompt, num_new));
    ASSERT_TRUE(core_->Submit(requests_.back()).ok());
  }
  // All requests end, with the tokens that they should have.
  void ExpectAllRight() {
    const FakeEngine oracle(SmallEngine());
    for (const Request& request : requests_) {
      ASSERT_EQ(TokensOf(log_.WaitForEnd(request.id)), oracle.Expected(request)) << request.id;
    }
  }

  TestCluster& cluster() { return cluster_; }
  RemoteEngine& engine() { return *engine_; }
  EngineCore& core() { return *core_; }
  EventLog& log() { return log_; }
  ClusterStats stats() const { return cluster_.leader->stats(); }
  int64_t lost(LossReason reason) const { return stats().ranks_lost[static_cast<size_t>(reason)]; }
  int64_t given_up(LossReason reason) const {
    return stats().groups_given_up[static_cast<size_t>(reason)];
  }

 private:
  TestCluster cluster_;
  std::unique_ptr<RemoteEngine> engine_;
  EventLog log_;
  std::unique_ptr<EngineCore> core_;
  std::vector<Request> requests_;
};

class RecoveryTest : public ::testing::TestWithParam<int32_t> {};
INSTANTIATE_TEST_SUITE_P(WorldSizes, RecoveryTest, ::testing::Values(1, 2, 4));

TEST_P(RecoveryTest, WithoutFaults) {
  Served served(GetParam());
  EXPECT_EQ(served.engine().info().num_dp_ranks, GetParam());
  EXPECT_EQ(served.engine().info().num_blocks, 64);
  for (int i = 0; i < 12; ++i) served.Submit(i, 30 + 20 * i, 40);
  served.ExpectAllRight();
  EXPECT_EQ(served.core().stats().num_recoveries, 0);
  EXPECT_EQ(served.stats().num_formed, 1);
  EXPECT_EQ(served.stats().transport, "fake");
}

TEST_P(RecoveryTest, ARankDiesInAStep) {
  Served served(GetParam());
  for (int i = 0; i < 12; ++i) served.Submit(i, 30 + 20 * i, 40);
  served.log().WaitForEvents(0, 3);
  served.cluster().fabric.InjectInStep(GetParam() - 1, Fault::kDie);
  served.ExpectAllRight();
  EXPECT_EQ(served.core().stats().num_recoveries, 1);
  EXPECT_EQ(served.lost(LossReason::kExited), 1);
  EXPECT_EQ(served.stats().num_formed, 2);
  EXPECT_EQ(served.cluster().fabric.num_loads, GetParam() + 1);  // the survivors kept theirs
}

TEST_P(RecoveryTest, ARankDiesWhileIdle) {
  Served served(GetParam(), {}, /*max_recoveries=*/0);  // it is no loss of a request's
  served.Submit(1, 200, 5);
  served.ExpectAllRight();
  served.cluster().ranks->Kill(0);
  served.cluster().AwaitEpoch(2);
  EXPECT_TRUE(served.engine().ready());
  served.Submit(2, 200, 5);  // its prefix was in the cache that is gone
  served.ExpectAllRight();
}

TEST_P(RecoveryTest, AStepFails) {
  Served served(GetParam());
  for (int i = 0; i < 6; ++i) served.Submit(i, 50, 30);
  served.log().WaitForEvents(0, 3);
  served.cluster().fabric.InjectInStep(0, Fault::kError);
  served.ExpectAllRight();
  EXPECT_EQ(served.given_up(LossReason::kStepError), 1);
  EXPECT_EQ(served.core().stats().num_recoveries, 1);
  EXPECT_EQ(served.cluster().fabric.num_loads, GetParam());  // nobody had to load again
}

TEST_P(RecoveryTest, ARankThatFailsStepAfterStepIsKilled) {
  Served served(GetParam());
  for (int i = 0; i < 6; ++i) served.Submit(i, 50, 30);
  served.log().WaitForEvents(0, 3);
  served.cluster().fabric.InjectInStep(0, Fault::kOwnError, 3);
  served.ExpectAllRight();
  EXPECT_EQ(served.given_up(LossReason::kStepError), 2);
  EXPECT_EQ(served.lost(LossReason::kFailed), 1);
  EXPECT_EQ(served.cluster().ranks->num_kills(), 1);
  EXPECT_EQ(served.cluster().fabric.num_loads, GetParam() + 1);
}

TEST_P(RecoveryTest, GarbageIsNotBelieved) {
  Served served(GetParam());
  for (int i = 0; i < 6; ++i) served.Submit(i, 50, 60);
  int num_garbage = 0;
  for (const Fault fault : {Fault::kFewTokens, Fault::kBadToken}) {
    served.log().WaitForEvents(0, 3 + 5 * num_garbage);
    served.cluster().fabric.InjectInStep(GetParam() - 1, fault);
    ++num_garbage;
    served.cluster().AwaitEpoch(1 + num_garbage);
    EXPECT_EQ(served.lost(LossReason::kGarbage), num_garbage);
  }
  served.ExpectAllRight();
  EXPECT_EQ(served.cluster().ranks->num_kills(), num_garbage);
}

TEST_P(RecoveryTest, AStepOverItsDeadlineNamesWhoWaitsWhere) {
  ClusterOptions options = TestOptions(GetParam());
  options.step_deadline = absl::Milliseconds(700);
  options.heartbeat_interval = absl::Milliseconds(50);
  Served served(GetParam(), options);
  served.Submit(1, 100, 40);
  served.log().WaitForEvents(1, 3);
  served.cluster().fabric.InjectInStep(0, Fault::kHang);
  served.ExpectAllRight();
  EXPECT_EQ(served.given_up(LossReason::kStepDeadline), 1);
  EXPECT_EQ(served.cluster().fabric.num_loads, GetParam());  // it aborts when it is told to
}

TEST_P(RecoveryTest, WhoDoesNotAbortIsKilled) {
  ClusterOptions options = TestOptions(GetParam());
  options.step_deadline = absl::Milliseconds(300);
  options.abort_timeout = absl::Milliseconds(200);
  Served served(GetParam(), options);
  served.Submit(1, 100, 40);
  served.log().WaitForEvents(1, 3);
  served.cluster().fabric.InjectInStep(0, Fault::kHangForEver);
  served.ExpectAllRight();
  EXPECT_EQ(served.lost(LossReason::kAbortTimeout), 1);
  EXPECT_EQ(served.cluster().ranks->num_kills(), 1);
  EXPECT_EQ(served.cluster().fabric.num_loads, GetParam() + 1);
}

TEST_P(RecoveryTest, ARankWhoseEngineIsLostIsStartedAgain) {
  Served served(GetParam());
  served.Submit(1, 100, 40);
  served.log().WaitForEvents(1, 3);
  served.cluster().fabric.InjectInStep(0, Fault::kLost);
  served.ExpectAllRight();
  EXPECT_EQ(served.lost(LossReason::kFailed), 1);
  EXPECT_THAT(std::string(served.cluster().ranks->last_exit(0).message()),
              HasSubstr("injected loss of the engine"));
}

TEST_P(RecoveryTest, FormingFailsAndIsTriedAgain) {
  Served served(GetParam());
  served.Submit(1, 100, 60);
  served.log().WaitForEvents(1, 3);
  served.cluster().fabric.InjectInJoin(0, Fault::kError);
  served.cluster().fabric.InjectInStep(GetParam() - 1, Fault::kDie);
  served.cluster().AwaitEpoch(3);
  served.cluster().fabric.InjectInJoin(GetParam() - 1, Fault::kDie);
  served.cluster().fabric.InjectInStep(0, Fault::kError);
  served.ExpectAllRight();
  EXPECT_EQ(served.given_up(LossReason::kFormError), 1);
}

TEST(RecoveryBudgetTest, OneLossTooManyEndsARequestWithUnavailable) {
  Served served(2, {}, /*max_recoveries=*/0);
  served.Submit(1, 100, 40);
  served.log().WaitForEvents(1, 3);
  served.cluster().fabric.InjectInStep(0, Fault::kDie);
  const std::vector<SequenceEvent> events = served.log().WaitForEnd(1);
  EXPECT_EQ(events.back().kind, SequenceEvent::Kind::kFailed);
  EXPECT_EQ(events.back().error.code(), absl::StatusCode::kUnavailable);
  served.cluster().AwaitEpoch(2);
  served.log().WaitForEnd(1);
}

// Any fault, at any time, of any rank, and several at once.
TEST(RecoveryPropertyTest, StreamsEndWithTheTokensOfAFaultlessRun) {
  const int num_rounds = std::getenv("LATENTD_TEST_LONG") != nullptr ? 40 : 3;
  for (int round = 0; round < num_rounds; ++round) {
    std::mt19937_64 random(round);
    const int32_t world_size = 1 + static_cast<int32_t>(random() % 4);
    ClusterOptions options = TestOptions(world_size);
    options.step_deadline = absl::Milliseconds(500);
    options.abort_timeout = absl::Milliseconds(300);
    options.form_timeout = absl::Milliseconds(2000);
    Served served(world_size, options, 1000, absl::Microseconds(300));
    FakeFabric& fabric = served.cluster().fabric;
    for (int i = 0; i < 24; ++i) {
      served.Submit(i, 1 + static_cast<int>(random() % 300), 1 + static_cast<int>(random() % 100));
    }
    for (int i = 0; i < 8; ++i) {
      absl::SleepFor(absl::Milliseconds(random() % 100));
      const auto rank = static_cast<int32_t>(random() % world_size);
      const auto fault = static_cast<Fault>(random() % kNumFaults);
      if (random() % 4 == 0) {
        fabric.InjectInJoin(rank, fault);
      } else if (random() % 4 == 0) {
        served.cluster().ranks->Kill(rank);
      } else {
        fabric.InjectInStep(rank, fault);
      }
    }
    served.ExpectAllRight();
    if (::testing::Test::HasFailure()) {
      ADD_FAILURE() << "round " << round;
      return;
    }
  }
}

}  // namespace
}  // namespace latentd
