#ifndef LATENTD_SERVER_CLIENT_SUMMARY_H_
#define LATENTD_SERVER_CLIENT_SUMMARY_H_

#include <cstdint>
#include <vector>

namespace latentd {

// Of samples, exact: quantiles by linear interpolation between order statistics, as numpy's
// default.
struct Summary {
  int64_t count = 0;
  double mean = 0, min = 0, p50 = 0, p90 = 0, p99 = 0, max = 0;
};

// Sorts `*samples`. All zero for none.
Summary Summarize(std::vector<float>* samples);

// The q-quantile, q in [0, 1]. REQUIRES: not empty, ascending.
double Quantile(const std::vector<float>& sorted, double q);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_SUMMARY_H_
