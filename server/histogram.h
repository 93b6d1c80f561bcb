#ifndef LATENTD_SERVER_HISTOGRAM_H_
#define LATENTD_SERVER_HISTOGRAM_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"

namespace latentd {

// A histogram that costs an observer two atomic additions: the core thread takes no lock.
class Histogram {
 public:
  // `bounds`: inclusive upper bounds of the buckets, ascending; one without a bound is added.
  explicit Histogram(absl::Span<const double> bounds);

  void Observe(double value, int64_t count = 1);

  struct Snapshot {
    std::vector<double> bounds;       // the last is infinite
    std::vector<int64_t> cumulative;  // [bounds]; observations not above each bound
    double sum = 0;
  };
  Snapshot Collect() const;

 private:
  const std::vector<double> bounds_;
  const std::unique_ptr<std::atomic<int64_t>[]> counts_;  // [bounds + 1]
  std::atomic<double> sum_{0};
};

}  // namespace latentd

#endif  // LATENTD_SERVER_HISTOGRAM_H_
