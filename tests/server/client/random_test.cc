#include "server/client/random.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

namespace latentd {
namespace {

constexpr int kNumDraws = 100'000;

// Largest distance between the samples' distribution and `cdf` (Kolmogorov and Smirnov).
template <typename Cdf>
double Distance(std::vector<double> samples, Cdf cdf) {
  std::sort(samples.begin(), samples.end());
  double distance = 0;
  const double n = static_cast<double>(samples.size());
  for (size_t i = 0; i < samples.size(); ++i) {
    const double expected = cdf(samples[i]);
    distance = std::max({distance, expected - static_cast<double>(i) / n,
                         static_cast<double>(i + 1) / n - expected});
  }
  return distance;
}
// Exceeded by one good generator in a million.
const double kCriticalDistance = 2.7 / std::sqrt(kNumDraws);

TEST(RandomTest, SameSeedSameNumbers) {
  Random a(7, 3), b(7, 3), other_seed(8, 3), other_stream(7, 4);
  int equal_seed = 0, equal_stream = 0;
  for (int i = 0; i < 1000; ++i) {
    const uint64_t number = a.Next();
    EXPECT_EQ(number, b.Next());
    equal_seed += number == other_seed.Next();
    equal_stream += number == other_stream.Next();
  }
  EXPECT_EQ(equal_seed, 0);
  EXPECT_EQ(equal_stream, 0);
}

TEST(RandomTest, Distributions) {
  Random random(1);
  std::vector<double> uniform, exponential, normal;
  for (int i = 0; i < kNumDraws; ++i) {
    uniform.push_back(random.Uniform());
    exponential.push_back(random.Exponential());
    normal.push_back(random.Normal());
  }
  EXPECT_LT(Distance(uniform, [](double x) { return x; }), kCriticalDistance);
  EXPECT_LT(Distance(exponential, [](double x) { return 1 - std::exp(-x); }), kCriticalDistance);
  EXPECT_LT(Distance(normal, [](double x) { return 0.5 * std::erfc(-x / std::sqrt(2)); }),
            kCriticalDistance);
}

TEST(RandomTest, FirstNumbersOfStreamsAreIndependent) {
  // A workload draws few numbers from each of many streams.
  std::vector<double> firsts;
  for (int i = 0; i < kNumDraws; ++i) firsts.push_back(Random(42, i).Uniform());
  EXPECT_LT(Distance(firsts, [](double x) { return x; }), kCriticalDistance);
}

TEST(RandomTest, BelowCoversItsRangeEvenly) {
  Random random(2);
  std::vector<int> counts(10);
  for (int i = 0; i < kNumDraws; ++i) ++counts.at(random.Below(10));
  double chi_square = 0;
  for (const int count : counts) {
    chi_square += std::pow(count - kNumDraws / 10, 2) / (kNumDraws / 10);
  }
  EXPECT_LT(chi_square, 45);  // 9 degrees of freedom, one in a million
  EXPECT_EQ(Random(2).Below(1), 0u);
}

TEST(ArrivalsTest, PoissonHasExponentialGaps) {
  Arrivals arrivals(Arrivals::Process::kPoisson, 50, 1);
  std::vector<double> gaps;
  double last = 0;
  for (int i = 0; i < kNumDraws; ++i) {
    const double next = arrivals.Next();
    ASSERT_GE(next, last);
    gaps.push_back(next - last);
    last = next;
  }
  EXPECT_LT(Distance(gaps, [](double x) { return 1 - std::exp(-50 * x); }), kCriticalDistance);
  EXPECT_NEAR(kNumDraws / last, 50, 1);
}

TEST(ArrivalsTest, ConstantIsEven) {
  Arrivals arrivals(Arrivals::Process::kConstant, 4, 1);
  for (int i = 0; i < 100; ++i) EXPECT_DOUBLE_EQ(arrivals.Next(), i / 4.0);
}

}  // namespace
}  // namespace latentd
