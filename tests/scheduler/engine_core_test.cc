#include "scheduler/engine_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <time.h>

#include <atomic>
#include <map>
#include <string>
#include <thread>

#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

constexpr absl::Duration kPatience = absl::Seconds(30);

Request MakeRequest(RequestId id, int num_tokens, int max_new_tokens) {
  Request request;
  request.id = id;
  for (int i = 0; i < num_tokens; ++i) request.prompt.push_back((id * 31 + i) % 1000);
  request.max_new_tokens = max_new_tokens;
  return request;
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

std::vector<TokenId> TokensOf(const std::vector<SequenceEvent>& events) {
  std::vector<TokenId> tokens;
  for (const SequenceEvent& event : events) {
    if (event.kind == SequenceEvent::Kind::kToken) tokens.push_back(event.token);
  }
  return tokens;
}

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

}  // namespace
}  // namespace latentd
