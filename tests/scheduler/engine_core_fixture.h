#ifndef LATENTD_TESTS_SCHEDULER_ENGINE_CORE_FIXTURE_H_
#define LATENTD_TESTS_SCHEDULER_ENGINE_CORE_FIXTURE_H_

#include <gtest/gtest.h>
#include <time.h>

#include <map>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "scheduler/engine_core.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {

inline constexpr absl::Duration kPatience = absl::Seconds(30);

inline Request MakeRequest(RequestId id, int num_tokens, int max_new_tokens) {
  Request request;
  request.id = id;
  for (int i = 0; i < num_tokens; ++i) request.prompt.push_back((id * 31 + i) % 1000);
  request.max_new_tokens = max_new_tokens;
  return request;
}

inline absl::Duration ProcessCpu() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return absl::DurationFromTimespec(time);
}

// Keeps the events of a core, and waits for them.
class EventLog {
 public:
  EngineCore::Callbacks callbacks() {
    return {.on_events = [this](std::vector<SequenceEvent> events) { Add(std::move(events)); }};
  }

  // The events of `id` once the last has come: a finish, or kFailed. All that came, if it never
  // does.
  std::vector<SequenceEvent> WaitForEnd(RequestId id) {
    absl::MutexLock lock(&mutex_);
    const auto ended = [&] { return HasEnded(id); };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&ended), kPatience)) << "request " << id;
    return events_[id];
  }

  // Waits until `id` has so many events.
  void WaitForEvents(RequestId id, size_t count) {
    absl::MutexLock lock(&mutex_);
    const auto enough = [&] { return events_[id].size() >= count; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&enough), kPatience)) << "request " << id;
  }

  std::map<RequestId, std::vector<SequenceEvent>> All() {
    absl::MutexLock lock(&mutex_);
    return events_;
  }

 private:
  void Add(std::vector<SequenceEvent> events) {
    absl::MutexLock lock(&mutex_);
    for (SequenceEvent& event : events) {
      EXPECT_FALSE(HasEnded(event.id)) << "an event after the last one of request " << event.id;
      events_[event.id].push_back(std::move(event));
    }
  }

  bool HasEnded(RequestId id) {
    const std::vector<SequenceEvent>& events = events_[id];
    return !events.empty() && events.back().finish != FinishReason::kNone;
  }

  absl::Mutex mutex_;
  std::map<RequestId, std::vector<SequenceEvent>> events_;
};

inline std::vector<TokenId> TokensOf(const std::vector<SequenceEvent>& events) {
  std::vector<TokenId> tokens;
  for (const SequenceEvent& event : events) {
    if (event.kind == SequenceEvent::Kind::kToken) tokens.push_back(event.token);
  }
  return tokens;
}

// A FakeEngine that can be made to wait in Execute().
class GatedEngine : public Engine {
 public:
  explicit GatedEngine(const FakeEngineOptions& options = {}) : fake_(options) {}

  EngineInfo info() const override { return fake_.info(); }
  bool lost() const override { return fake_.lost(); }
  bool ready() const override { return fake_.ready(); }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    {
      absl::MutexLock lock(&mutex_);
      ++num_entered_;
      const auto may_pass = [this] { return open_ || num_may_pass_ > 0; };
      mutex_.Await(absl::Condition(&may_pass));
      if (!open_) --num_may_pass_;
    }
    return fake_.Execute(plan);
  }

  void Close() { Set(false); }
  void Open() { Set(true); }

  void LetOnePass() {
    absl::MutexLock lock(&mutex_);
    ++num_may_pass_;
  }

  // Waits until a step waits at the closed gate.
  void WaitForStep() {
    absl::MutexLock lock(&mutex_);
    const auto waits = [this] { return num_entered_ > num_seen_; };
    EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&waits), kPatience));
    num_seen_ = num_entered_;
  }

  FakeEngine& fake() { return fake_; }

 private:
  void Set(bool open) {
    absl::MutexLock lock(&mutex_);
    open_ = open;
    num_seen_ = num_entered_;
  }

  FakeEngine fake_;
  absl::Mutex mutex_;
  bool open_ = true;
  int num_may_pass_ = 0;
  int num_entered_ = 0;
  int num_seen_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SCHEDULER_ENGINE_CORE_FIXTURE_H_
