// The core with an engine that loses steps, because its group is formed again.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "scheduler/engine_core.h"
#include "tests/scheduler/engine_core_fixture.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

// Keeps what on_ready_change tells.
class ReadyLog {
 public:
  std::function<void(bool)> callback() {
    return [this](bool ready) {
      absl::MutexLock lock(&mutex_);
      changes_.push_back(ready);
    };
  }
  void WaitForChanges(size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto enough = [&] { return changes_.size() >= count; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&enough), kPatience));
  }
  std::vector<bool> changes() {
    absl::MutexLock lock(&mutex_);
    return changes_;
  }

 private:
  absl::Mutex mutex_;
  std::vector<bool> changes_;
};

TEST(EngineCoreRecoveryTest, AStreamGoesOnAfterALostStepAsIfNothingHadHappened) {
  GatedEngine engine;
  EventLog log;
  ReadyLog ready;
  EngineCore::Callbacks callbacks = log.callbacks();
  callbacks.on_ready_change = ready.callback();
  absl::Mutex mutex;
  std::vector<StepReport> reports;
  callbacks.on_step = [&](const StepReport& report) {
    absl::MutexLock lock(&mutex);
    reports.push_back(report);
  };
  EngineCore core({}, &engine, std::move(callbacks));
  const Request request = MakeRequest(1, 100, 20);
  const Request later = MakeRequest(2, 100, 20);
  const Request cancelled = MakeRequest(3, 100, 20);
  engine.Close();
  ASSERT_TRUE(core.Submit(request).ok());
  for (int i = 0; i < 5; ++i) {
    engine.WaitForStep();
    engine.LetOnePass();
  }
  engine.WaitForStep();
  engine.fake().set_ready(false);
  engine.Open();
  ready.WaitForChanges(1);
  // Nobody waits for the engine but the step.
  ASSERT_TRUE(core.Submit(later).ok());
  ASSERT_TRUE(core.Submit(cancelled).ok());
  core.Cancel(3);
  const absl::Time limit = absl::Now() + kPatience;
  while (core.stats().num_waiting != 2 && absl::Now() < limit)
    absl::SleepFor(absl::Milliseconds(1));
  CoreStats stats = core.stats();
  EXPECT_FALSE(stats.ready);
  EXPECT_GT(stats.not_ready, absl::ZeroDuration());
  EXPECT_EQ(stats.num_recoveries, 1);
  EXPECT_EQ(stats.num_recovered, 1);
  EXPECT_EQ(stats.num_unrecovered, 0);
  EXPECT_EQ(stats.num_running, 0);
  EXPECT_EQ(stats.num_waiting, 2);
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
  EXPECT_EQ(stats.step_started_at, absl::InfinitePast());  // no watchdog's business
  EXPECT_EQ(log.All()[1].size(), 6u);                      // started, five tokens
  engine.fake().set_ready(true);
  EXPECT_EQ(TokensOf(log.WaitForEnd(1)), engine.fake().Expected(request));
  EXPECT_EQ(TokensOf(log.WaitForEnd(2)), engine.fake().Expected(later));
  EXPECT_TRUE(log.All()[3].empty());
  EXPECT_EQ(ready.changes(), (std::vector<bool>{false, true}));
  core.Stop();
  stats = core.stats();
  EXPECT_TRUE(stats.ready);
  EXPECT_EQ(stats.not_ready, core.stats().not_ready);  // it stands
  absl::MutexLock lock(&mutex);
  ASSERT_GT(reports.size(), 7u);
  EXPECT_TRUE(reports[5].aborted);
  EXPECT_EQ(reports[5].num_sampled, 0);
  EXPECT_FALSE(reports[6].aborted);
  EXPECT_TRUE(reports[6].after_pause);
  EXPECT_EQ(reports[6].num_tokens, 205);
}

TEST(EngineCoreRecoveryTest, StopAndCancelDoNotWaitForTheEngine) {
  FakeEngine engine;
  engine.set_ready(false);
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 5)).ok());
  ASSERT_TRUE(core.Submit(MakeRequest(2, 10, 5)).ok());
  core.Cancel(1);
  core.Stop();
  EXPECT_TRUE(log.All()[1].empty());
  const std::vector<SequenceEvent> events = log.WaitForEnd(2);
  ASSERT_EQ(events.size(), 1u);
  EXPECT_EQ(events[0].error.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.num_steps(), 0);
}

TEST(EngineCoreRecoveryTest, ReadinessIsToldWhileNobodyAsksForAnything) {
  FakeEngine engine;
  EventLog log;
  ReadyLog ready;
  EngineCore::Callbacks callbacks = log.callbacks();
  callbacks.on_ready_change = ready.callback();
  EngineCore core({}, &engine, std::move(callbacks));
  engine.set_ready(false);
  ready.WaitForChanges(1);
  engine.set_ready(true);
  ready.WaitForChanges(2);
  EXPECT_EQ(ready.changes(), (std::vector<bool>{false, true}));
}

TEST(EngineCoreRecoveryTest, RecoveryTimeoutEndsAllAndRefusesUntilTheEngineIsReady) {
  GatedEngine engine;
  EventLog log;
  ReadyLog ready;
  EngineCore::Callbacks callbacks = log.callbacks();
  callbacks.on_ready_change = ready.callback();
  EngineCore core({.max_running = 1}, &engine, std::move(callbacks), absl::Milliseconds(50));
  engine.Close();
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 5)).ok());
  ASSERT_TRUE(core.Submit(MakeRequest(2, 10, 5)).ok());
  engine.WaitForStep();
  engine.fake().set_ready(false);
  engine.Open();
  for (const RequestId id : {1, 2}) {
    const SequenceEvent end = log.WaitForEnd(id).back();
    EXPECT_EQ(end.kind, SequenceEvent::Kind::kFailed);
    EXPECT_EQ(end.error.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(end.error.message()),
                HasSubstr("within 50ms (recovery_timeout): a rank is missing"));
  }
  const absl::Status refused = core.Submit(MakeRequest(3, 10, 5));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("recovery_timeout"));
  EXPECT_EQ(core.stats().num_unrecovered, 2);
  engine.fake().set_ready(true);
  ready.WaitForChanges(2);
  const Request request = MakeRequest(4, 10, 5);
  ASSERT_TRUE(core.Submit(request).ok());
  EXPECT_EQ(TokensOf(log.WaitForEnd(4)), engine.fake().Expected(request));
}

TEST(EngineCoreRecoveryTest, ARequestThatLosesStepAfterStepEnds) {
  FakeEngine engine;
  EventLog log;
  EngineCore core({.max_recoveries = 2}, &engine, log.callbacks());
  engine.abort_next_steps(3);
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 5)).ok());
  const SequenceEvent end = log.WaitForEnd(1).back();
  EXPECT_EQ(end.error.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(end.error.message()), HasSubstr("injected loss of a rank"));
  const Request request = MakeRequest(2, 10, 5);
  ASSERT_TRUE(core.Submit(request).ok());
  EXPECT_EQ(TokensOf(log.WaitForEnd(2)), engine.Expected(request));
  const CoreStats stats = core.stats();
  EXPECT_EQ(stats.num_recoveries, 3);
  EXPECT_EQ(stats.num_recovered, 2);
  EXPECT_EQ(stats.num_unrecovered, 1);
}

TEST(EngineCoreRecoveryTest, AnEngineThatIsLostWhileItIsNotReadyEndsAll) {
  FakeEngine engine;
  EventLog log;
  absl::Notification lost;
  EngineCore::Callbacks callbacks = log.callbacks();
  callbacks.on_lost = [&](const absl::Status& why) {
    EXPECT_EQ(why.code(), absl::StatusCode::kUnavailable);
    lost.Notify();  // twice would abort
  };
  EngineCore core({}, &engine, std::move(callbacks), absl::Milliseconds(1));
  engine.set_ready(false);
  engine.lose();
  const absl::Status submitted = core.Submit(MakeRequest(1, 10, 5));
  ASSERT_TRUE(lost.WaitForNotificationWithTimeout(kPatience));
  if (submitted.ok()) {
    EXPECT_EQ(log.WaitForEnd(1).back().kind, SequenceEvent::Kind::kFailed);
  }
  EXPECT_EQ(core.Submit(MakeRequest(2, 10, 5)).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(engine.num_steps(), 0);
}

// Steps are lost at random and the engine is away at random; requests come and are cancelled
// meanwhile. Whoever is not cancelled gets the tokens of an engine that never fails; or, where the
// budget is small, the first of them and UNAVAILABLE.
class LossyEngineTest : public ::testing::TestWithParam<int> {};

TEST_P(LossyEngineTest, TheTokensAreThoseOfTheUndisturbedRun) {
  FakeEngineOptions options;
  options.info.num_blocks = 24;
  options.info.num_dp_ranks = 3;
  options.abort_probability = 0.05;
  options.max_unready_looks = 2;
  options.failure_seed = 7;
  FakeEngine engine(options);
  EventLog log;
  EngineCore core({.max_step_tokens = 256, .max_running = 8, .max_recoveries = GetParam()}, &engine,
                  log.callbacks());
  constexpr int kNumRequests = 200;
  std::map<RequestId, Request> kept;
  for (RequestId id = 1; id <= kNumRequests; ++id) {
    Request request = MakeRequest(id % 17, 1 + static_cast<int>(id * 37 % 300),
                                  1 + static_cast<int>(id * 13 % 60));
    request.id = id;
    ASSERT_TRUE(core.Submit(request).ok());
    if (id % 5 == 0) {
      if (id % 2 == 0) log.WaitForEvents(id, 1);
      core.Cancel(id);
    } else {
      kept[id] = request;
    }
  }
  int num_failed = 0;
  for (const auto& [id, request] : kept) {
    const std::vector<SequenceEvent> events = log.WaitForEnd(id);
    EXPECT_EQ(events.front().kind, SequenceEvent::Kind::kStarted);
    std::vector<TokenId> expected = engine.Expected(request);
    const std::vector<TokenId> tokens = TokensOf(events);
    if (events.back().kind == SequenceEvent::Kind::kFailed) {
      EXPECT_EQ(events.back().error.code(), absl::StatusCode::kUnavailable);
      ASSERT_LT(tokens.size(), expected.size());
      expected.resize(tokens.size());
      ++num_failed;
    }
    EXPECT_EQ(tokens, expected) << "request " << id;
  }
  core.Stop();
  const CoreStats stats = core.stats();
  EXPECT_GT(stats.num_recoveries, 4);
  EXPECT_GT(stats.num_recovered, 20);
  EXPECT_GT(stats.not_ready, absl::ZeroDuration());
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
  // Of the cancelled ones some may have failed before.
  EXPECT_GE(stats.num_unrecovered, num_failed);
  EXPECT_EQ(num_failed > 0, GetParam() == 1);
}

INSTANTIATE_TEST_SUITE_P(MaxRecoveries, LossyEngineTest, ::testing::Values(1, 1'000'000));

TEST(EngineCoreRecoveryTest, AnEngineThatIsNotReadyBurnsNoCpu) {
  FakeEngine engine;
  engine.set_ready(false);
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 5)).ok());
  const absl::Duration before = ProcessCpu();
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_LT(ProcessCpu() - before, absl::Milliseconds(60));
  EXPECT_EQ(engine.num_steps(), 0);
}

}  // namespace
}  // namespace latentd
