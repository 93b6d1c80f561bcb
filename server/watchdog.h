#ifndef LATENTD_SERVER_WATCHDOG_H_
#define LATENTD_SERVER_WATCHDOG_H_

#include <functional>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

namespace latentd {

// Judges whether the process makes progress, on a thread of its own: what it watches may hang.
class Watchdog {
 public:
  struct Options {
    absl::Duration deadline;  // work that takes longer is stuck
    // When the work under way began, or last moved; absl::InfinitePast() while there is none. Must
    // not block.
    std::function<absl::Time()> busy_since;
    // Told when the judgement changes: stuck, and for how long; or moving again.
    std::function<void(bool stuck, absl::Duration busy)> on_change;
  };

  explicit Watchdog(Options options);  // starts to watch
  ~Watchdog();

 private:
  void Run();

  const Options options_;
  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_WATCHDOG_H_
