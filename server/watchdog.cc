#include "server/watchdog.h"

#include <algorithm>
#include <utility>

#include "absl/time/clock.h"

namespace latentd {

Watchdog::Watchdog(Options options) : options_(std::move(options)), thread_([this] { Run(); }) {}

Watchdog::~Watchdog() {
  stop_.Notify();
  thread_.join();
}

void Watchdog::Run() {
  // Often enough that the verdict comes at most a tenth of the deadline late.
  const absl::Duration interval =
      std::clamp(options_.deadline / 10, absl::Milliseconds(10), absl::Seconds(1));
  bool stuck = false;
  while (!stop_.WaitForNotificationWithTimeout(interval)) {
    const absl::Time since = options_.busy_since();
    const absl::Duration busy =
        since == absl::InfinitePast() ? absl::ZeroDuration() : absl::Now() - since;
    if ((busy > options_.deadline) == stuck) continue;
    stuck = !stuck;
    options_.on_change(stuck, busy);
  }
}

}  // namespace latentd
