#include "server/histogram.h"

#include <algorithm>
#include <limits>

namespace latentd {

Histogram::Histogram(absl::Span<const double> bounds)
    : bounds_(bounds.begin(), bounds.end()),
      counts_(new std::atomic<int64_t>[bounds_.size() + 1]()) {}

void Histogram::Observe(double value, int64_t count) {
  const size_t bucket = std::lower_bound(bounds_.begin(), bounds_.end(), value) - bounds_.begin();
  counts_[bucket].fetch_add(count, std::memory_order_relaxed);
  sum_.fetch_add(value * static_cast<double>(count), std::memory_order_relaxed);
}

Histogram::Snapshot Histogram::Collect() const {
  Snapshot snapshot{.bounds = bounds_, .cumulative = {}, .sum = 0};
  snapshot.bounds.push_back(std::numeric_limits<double>::infinity());
  int64_t cumulative = 0;
  for (size_t i = 0; i <= bounds_.size(); ++i) {
    cumulative += counts_[i].load(std::memory_order_relaxed);
    snapshot.cumulative.push_back(cumulative);
  }
  snapshot.sum = sum_.load(std::memory_order_relaxed);
  return snapshot;
}

}  // namespace latentd
