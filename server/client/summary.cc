#include "server/client/summary.h"

#include <algorithm>
#include <numeric>

#include "engine/status.h"

namespace latentd {

double Quantile(const std::vector<float>& sorted, double q) {
  LATENTD_CHECK(!sorted.empty());
  const double position = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(position);
  const size_t above = std::min(below + 1, sorted.size() - 1);
  const double weight = position - static_cast<double>(below);
  return sorted[below] + weight * (static_cast<double>(sorted[above]) - sorted[below]);
}

Summary Summarize(std::vector<float>* samples) {
  if (samples->empty()) return {};
  std::sort(samples->begin(), samples->end());
  const auto count = static_cast<int64_t>(samples->size());
  return {
      .count = count,
      .mean = std::accumulate(samples->begin(), samples->end(), 0.0) / static_cast<double>(count),
      .min = samples->front(),
      .p50 = Quantile(*samples, 0.5),
      .p90 = Quantile(*samples, 0.9),
      .p99 = Quantile(*samples, 0.99),
      .max = samples->back()};
}

}  // namespace latentd
