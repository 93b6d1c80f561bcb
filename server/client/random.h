#ifndef LATENTD_SERVER_CLIENT_RANDOM_H_
#define LATENTD_SERVER_CLIENT_RANDOM_H_

#include <cstdint>

namespace latentd {

// SplitMix64: the same numbers from the same (seed, stream) with every compiler, which the standard
// library's distributions do not promise. Streams are independent for all practical purposes.
class Random {
 public:
  explicit Random(uint64_t seed, uint64_t stream = 0);

  uint64_t Next();
  // In [0, n). REQUIRES: n > 0.
  uint64_t Below(uint64_t n);
  // In (0, 1].
  double Uniform();
  // Mean 1.
  double Exponential();
  // Mean 0, standard deviation 1.
  double Normal();

 private:
  uint64_t state_;
};

// When requests are sent in open loop: a Poisson process, or evenly spaced.
class Arrivals {
 public:
  enum class Process { kPoisson, kConstant };

  // `rate` is in requests a second. REQUIRES: rate > 0.
  Arrivals(Process process, double rate, uint64_t seed);

  // Seconds from the start to the next arrival; never falls.
  double Next();

 private:
  const Process process_;
  const double rate_;
  Random random_;
  double now_s_ = 0;
  int64_t num_arrivals_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_RANDOM_H_
