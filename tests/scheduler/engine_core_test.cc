#include "scheduler/engine_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "tests/scheduler/engine_core_fixture.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

TEST(EngineCoreTest, ARequestStartsThenStreamsThenFinishes) {
  FakeEngine engine;
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  const Request request = MakeRequest(7, 100, 20);
  ASSERT_TRUE(core.Submit(request).ok());
  const std::vector<SequenceEvent> events = log.WaitForEnd(7);
  ASSERT_EQ(events.size(), 21u);
  EXPECT_EQ(events[0].kind, SequenceEvent::Kind::kStarted);
  EXPECT_EQ(TokensOf(events), engine.Expected(request));
  EXPECT_EQ(events.back().finish, FinishReason::kLength);
}

TEST(EngineCoreTest, StartedComesBeforeTheStepIsDone) {
  GatedEngine engine;
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  engine.Close();
  ASSERT_TRUE(core.Submit(MakeRequest(1, 100, 2)).ok());
  log.WaitForEvents(1, 1);
  EXPECT_EQ(log.All()[1][0].kind, SequenceEvent::Kind::kStarted);
  engine.Open();
  log.WaitForEnd(1);
}

TEST(EngineCoreTest, ReportsEachStep) {
  FakeEngine engine;
  EventLog log;
  EngineCore::Callbacks callbacks = log.callbacks();
  absl::Mutex mutex;
  std::vector<StepReport> reports;
  callbacks.on_step = [&](const StepReport& report) {
    absl::MutexLock lock(&mutex);
    reports.push_back(report);
  };
  EngineCore core({.max_step_tokens = 60}, &engine, callbacks);
  ASSERT_TRUE(core.Submit(MakeRequest(1, 100, 3)).ok());
  log.WaitForEnd(1);
  core.Stop();
  absl::MutexLock lock(&mutex);
  ASSERT_EQ(reports.size(), 4u);
  const int32_t num_tokens[] = {60, 40, 1, 1};
  const int32_t num_sampled[] = {0, 1, 1, 1};
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(reports[i].num_sequences, 1);
    EXPECT_EQ(reports[i].num_tokens, num_tokens[i]);
    EXPECT_EQ(reports[i].num_sampled, num_sampled[i]);
    EXPECT_GE(reports[i].execute, absl::ZeroDuration());
    EXPECT_EQ(reports[i].after_pause, i == 0);
    EXPECT_FALSE(reports[i].device.has_value());  // the fake engine has none
  }
}

TEST(EngineCoreTest, RefusesWhatCannotRun) {
  FakeEngine engine;
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  const absl::Status status = core.Submit(MakeRequest(1, 65536, 1));
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the model accepts 65536"));
}

TEST(EngineCoreTest, SubmitAndStatsDoNotWaitForAStepAndTheQueueIsBounded) {
  GatedEngine engine;
  EventLog log;
  EngineCore core({.max_running = 1, .max_waiting = 3}, &engine, log.callbacks());
  engine.Close();
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 5)).ok());
  engine.WaitForStep();
  for (RequestId id : {2, 3, 4}) EXPECT_TRUE(core.Submit(MakeRequest(id, 10, 5)).ok());
  const absl::Status full = core.Submit(MakeRequest(5, 10, 5));
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_waiting is 3"));
  CoreStats stats = core.stats();
  EXPECT_EQ(stats.num_waiting, 3);
  EXPECT_EQ(stats.num_running, 1);
  EXPECT_EQ(stats.num_blocks - stats.num_free_blocks, 1);
  EXPECT_GT(stats.step_started_at, absl::Now() - kPatience);
  engine.Open();
  for (RequestId id : {1, 2, 3, 4}) log.WaitForEnd(id);
  stats = core.stats();
  EXPECT_EQ(stats.num_waiting + stats.num_running, 0);
  EXPECT_EQ(stats.num_free_blocks, stats.num_blocks);
  EXPECT_EQ(stats.prompt_tokens, 40);
  EXPECT_EQ(stats.num_steps, 20);
  EXPECT_EQ(stats.step_started_at, absl::InfinitePast());
}

TEST(EngineCoreTest, CancelledBlocksAreFreeAtTheNextStep) {
  GatedEngine engine;
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  ASSERT_TRUE(core.Submit(MakeRequest(1, 640, 50'000)).ok());
  ASSERT_TRUE(core.Submit(MakeRequest(2, 64, 50'000)).ok());
  log.WaitForEvents(1, 5);
  log.WaitForEvents(2, 5);
  engine.Close();
  engine.WaitForStep();
  const int32_t num_used = core.stats().num_blocks - core.stats().num_free_blocks;
  core.Cancel(1);
  const size_t num_events = log.All()[1].size();
  engine.LetOnePass();
  engine.WaitForStep();
  EXPECT_LE(core.stats().num_blocks - core.stats().num_free_blocks, num_used - 10);
  EXPECT_EQ(core.stats().num_running, 1);
  core.Cancel(2);
  engine.Open();
  core.Stop();
  EXPECT_LE(log.All()[1].size(), num_events + 1);  // the step that ran brought one more
  EXPECT_EQ(core.stats().num_free_blocks, core.stats().num_blocks);
}

TEST(EngineCoreTest, CancelsAloneAreAppliedToo) {
  FakeEngine engine({.step_delay = absl::Milliseconds(1)});
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 50'000)).ok());
  log.WaitForEvents(1, 2);
  core.Cancel(1);
  const absl::Time limit = absl::Now() + kPatience;
  while (core.stats().num_running > 0 && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_EQ(core.stats().num_free_blocks, core.stats().num_blocks);
  ASSERT_TRUE(core.Submit(MakeRequest(2, 10, 5)).ok());
  log.WaitForEnd(2);
}

TEST(EngineCoreTest, StopFailsWhatIsUnfinishedAndRefusesMore) {
  FakeEngine engine({.step_delay = absl::Milliseconds(1)});
  EventLog log;
  EngineCore core({.max_running = 1}, &engine, log.callbacks());
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 50'000)).ok());
  ASSERT_TRUE(core.Submit(MakeRequest(2, 10, 5)).ok());
  log.WaitForEvents(1, 3);
  core.Stop();
  for (RequestId id : {1, 2}) {
    const std::vector<SequenceEvent> events = log.WaitForEnd(id);
    ASSERT_FALSE(events.empty());
    EXPECT_EQ(events.back().kind, SequenceEvent::Kind::kFailed);
    EXPECT_EQ(events.back().error.code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(core.Submit(MakeRequest(3, 10, 5)).code(), absl::StatusCode::kUnavailable);
  core.Cancel(1);
  core.Stop();
  EXPECT_EQ(core.stats().num_waiting + core.stats().num_running, 0);
}

TEST(EngineCoreTest, AFailedStepFailsItsRequestsAndTheWaitingGoOn) {
  GatedEngine engine;
  EventLog log;
  EngineCore core({.max_running = 1}, &engine, log.callbacks());
  engine.Close();
  ASSERT_TRUE(core.Submit(MakeRequest(1, 100, 20)).ok());
  const Request second = MakeRequest(2, 100, 20);
  ASSERT_TRUE(core.Submit(second).ok());
  engine.WaitForStep();
  engine.fake().fail_next_steps(1);
  engine.Open();
  const std::vector<SequenceEvent> failed = log.WaitForEnd(1);
  EXPECT_EQ(failed.back().kind, SequenceEvent::Kind::kFailed);
  EXPECT_EQ(failed.back().error.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(failed.back().error.message()), HasSubstr("injected failure"));
  EXPECT_EQ(TokensOf(log.WaitForEnd(2)), engine.fake().Expected(second));
}

TEST(EngineCoreTest, AnEngineThatKeepsFailingIsLeftAloneForAWhile) {
  FakeEngine engine;
  EventLog log;
  EngineCore core({.max_running = 1}, &engine, log.callbacks());
  engine.fail_next_steps(3);
  absl::Status refused;
  RequestId id = 0;
  while (refused.ok() && id < 1000) {
    const absl::Status submitted = core.Submit(MakeRequest(++id, 10, 5));
    if (submitted.ok()) {
      EXPECT_EQ(log.WaitForEnd(id).back().kind, SequenceEvent::Kind::kFailed);
    } else {
      refused = submitted;
    }
  }
  EXPECT_EQ(id, 4u);
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("injected failure"));
  EXPECT_EQ(engine.num_steps(), 3);
  // The next try, after the rest, finds the engine well again.
  const Request request = MakeRequest(2000, 10, 5);
  const absl::Time limit = absl::Now() + kPatience;
  while (!core.Submit(request).ok() && absl::Now() < limit) absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(TokensOf(log.WaitForEnd(2000)), engine.Expected(request));
}

TEST(EngineCoreTest, TheThirdFailureOnEndTakesTheWaitingAlong) {
  GatedEngine engine;
  EventLog log;
  EngineCore core({.max_running = 1}, &engine, log.callbacks());
  engine.Close();
  for (RequestId id = 1; id <= 10; ++id) ASSERT_TRUE(core.Submit(MakeRequest(id, 10, 5)).ok());
  engine.fake().fail_next_steps(100);
  engine.Open();
  for (RequestId id = 1; id <= 10; ++id) {
    EXPECT_EQ(log.WaitForEnd(id).back().error.code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(engine.fake().num_steps(), 3);
}

TEST(EngineCoreTest, ALostEngineEndsAllRequestsAtOnceAndForGood) {
  GatedEngine engine;
  EventLog log;
  std::vector<absl::Status> losses;
  absl::Notification lost;
  EngineCore::Callbacks callbacks = log.callbacks();
  callbacks.on_lost = [&](const absl::Status& status) {
    losses.push_back(status);
    // The events came first.
    for (RequestId id = 1; id <= 5; ++id) EXPECT_FALSE(log.All()[id].empty());
    lost.Notify();
  };
  EngineCore core({.max_running = 2}, &engine, std::move(callbacks));
  engine.Close();
  for (RequestId id = 1; id <= 5; ++id) ASSERT_TRUE(core.Submit(MakeRequest(id, 10, 5)).ok());
  engine.WaitForStep();
  engine.fake().lose();
  engine.Open();
  for (RequestId id = 1; id <= 5; ++id) {
    const SequenceEvent end = log.WaitForEnd(id).back();
    EXPECT_EQ(end.kind, SequenceEvent::Kind::kFailed);
    EXPECT_EQ(end.error.code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(end.error.message()), HasSubstr("injected loss"));
  }
  ASSERT_TRUE(lost.WaitForNotificationWithTimeout(kPatience));
  EXPECT_EQ(engine.fake().num_steps(), 1);
  // A step that only fails is given another try after a second.
  absl::SleepFor(absl::Milliseconds(1200));
  const absl::Status refused = core.Submit(MakeRequest(6, 10, 5));
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("injected loss"));
  EXPECT_EQ(engine.fake().num_steps(), 1);
  core.Stop();
  ASSERT_EQ(losses.size(), 1u);
  EXPECT_EQ(losses[0].message(), refused.message());
}

TEST(EngineCoreTest, AnIdleCoreBurnsNoCpu) {
  FakeEngine engine;
  EventLog log;
  EngineCore core({}, &engine, log.callbacks());
  ASSERT_TRUE(core.Submit(MakeRequest(1, 10, 5)).ok());
  log.WaitForEnd(1);
  const absl::Duration before = ProcessCpu();
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_LT(ProcessCpu() - before, absl::Milliseconds(60));
  EXPECT_EQ(engine.num_steps(), 5);
}

// Many threads submit and cancel while steps run, some of which fail; then the core is stopped
// under them. Every request that was accepted and not cancelled comes to one end; finished ones are
// right.
TEST(EngineCoreTest, ThreadsSubmitCancelAndStopAtOnce) {
  FakeEngineOptions options;
  options.info.num_blocks = 64;
  options.info.num_dp_ranks = 2;
  options.failure_probability = 0.001;
  FakeEngine engine(options);
  EventLog log;
  EngineCore core({.max_step_tokens = 512, .max_running = 32, .max_waiting = 64}, &engine,
                  log.callbacks());
  constexpr int kNumThreads = 4;
  constexpr int kRequestsEach = 300;
  absl::Mutex mutex;
  std::map<RequestId, Request> accepted;  // and not cancelled
  std::atomic<int> num_done = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kNumThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kRequestsEach; ++i) {
        const RequestId id = 1 + t * kRequestsEach + i;
        const Request request = MakeRequest(id % 50, 1 + (id * 37) % 300, 1 + (id * 13) % 40);
        Request copy = request;
        copy.id = id;
        const absl::Status status = core.Submit(copy);
        if (!status.ok()) {
          EXPECT_TRUE(absl::IsResourceExhausted(status) || absl::IsUnavailable(status)) << status;
          absl::SleepFor(absl::Microseconds(200));
          continue;
        }
        if (id % 5 == 0) {
          core.Cancel(id);
        } else {
          absl::MutexLock lock(&mutex);
          accepted[id] = copy;
        }
        EXPECT_GE(core.stats().num_free_blocks, 0);
      }
      ++num_done;
    });
  }
  while (num_done < kNumThreads - 1) absl::SleepFor(absl::Milliseconds(1));
  std::thread stopper([&] { core.Stop(); });
  core.Stop();
  stopper.join();
  for (std::thread& thread : threads) thread.join();
  int num_finished = 0;
  std::map<RequestId, std::vector<SequenceEvent>> events = log.All();
  for (const auto& [id, request] : accepted) {
    ASSERT_FALSE(events[id].empty()) << "request " << id;
    if (events[id].back().kind == SequenceEvent::Kind::kFailed) continue;
    EXPECT_NE(events[id].back().finish, FinishReason::kNone) << "request " << id;
    EXPECT_EQ(TokensOf(events[id]), engine.Expected(request)) << "request " << id;
    ++num_finished;
  }
  EXPECT_GT(num_finished, 0);
  EXPECT_EQ(core.stats().num_free_blocks, core.stats().num_blocks);
}

}  // namespace
}  // namespace latentd
