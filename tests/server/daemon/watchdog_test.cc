#include "server/watchdog.h"

#include <atomic>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace latentd {
namespace {

// A watched process whose work the test controls.
class WatchdogTest : public ::testing::Test {
 protected:
  Watchdog::Options Options(absl::Duration deadline) {
    return {.deadline = deadline,
            .busy_since =
                [this] {
                  const int64_t since = busy_since_;
                  return since == 0 ? absl::InfinitePast() : absl::FromUnixNanos(since);
                },
            .on_change =
                [this](bool stuck, absl::Duration busy) {
                  absl::MutexLock lock(&mutex_);
                  stuck_ = stuck;
                  busy_ = busy;
                  ++num_changes_;
                }};
  }
  bool WaitForChanges(int count) {
    absl::MutexLock lock(&mutex_);
    const auto reached = [this, count] { return num_changes_ >= count; };
    return mutex_.AwaitWithTimeout(absl::Condition(&reached), absl::Seconds(20));
  }
  int num_changes() {
    absl::MutexLock lock(&mutex_);
    return num_changes_;
  }

  std::atomic<int64_t> busy_since_{0};
  absl::Mutex mutex_;
  bool stuck_ = false;
  absl::Duration busy_;
  int num_changes_ = 0;
};

TEST_F(WatchdogTest, IdleIsNotStuck) {
  Watchdog watchdog(Options(absl::Milliseconds(20)));
  absl::SleepFor(absl::Milliseconds(150));
  EXPECT_EQ(num_changes(), 0);
}

TEST_F(WatchdogTest, WorkThatMovesIsNotStuck) {
  Watchdog watchdog(Options(absl::Seconds(5)));
  for (int i = 0; i < 20; ++i) {
    busy_since_ = absl::GetCurrentTimeNanos();
    absl::SleepFor(absl::Milliseconds(10));
  }
  EXPECT_EQ(num_changes(), 0);
}

TEST_F(WatchdogTest, TellsOnceWhenWorkSticksAndOnceWhenItMovesAgain) {
  Watchdog watchdog(Options(absl::Milliseconds(50)));
  busy_since_ = absl::GetCurrentTimeNanos();
  ASSERT_TRUE(WaitForChanges(1));
  {
    absl::MutexLock lock(&mutex_);
    EXPECT_TRUE(stuck_);
    EXPECT_GT(busy_, absl::Milliseconds(50));
  }
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_EQ(num_changes(), 1);
  busy_since_ = 0;
  ASSERT_TRUE(WaitForChanges(2));
  absl::MutexLock lock(&mutex_);
  EXPECT_FALSE(stuck_);
}

}  // namespace
}  // namespace latentd
