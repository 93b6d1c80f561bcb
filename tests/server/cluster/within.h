#ifndef LATENTD_TESTS_SERVER_CLUSTER_WITHIN_H_
#define LATENTD_TESTS_SERVER_CLUSTER_WITHIN_H_

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace latentd {

inline constexpr absl::Duration kPatience = absl::Seconds(60);  // of tests on a busy machine

// Whether `condition()` comes true within `time`.
template <typename Condition>
bool Within(absl::Duration time, Condition condition) {
  const absl::Time deadline = absl::Now() + time;
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_CLUSTER_WITHIN_H_
