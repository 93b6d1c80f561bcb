#include "server/client/random.h"

#include <cmath>
#include <numbers>

namespace latentd {
namespace {

constexpr uint64_t kGoldenGamma = 0x9e3779b97f4a7c15;

uint64_t Mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

}  // namespace

Random::Random(uint64_t seed, uint64_t stream) : state_(Mix(seed + kGoldenGamma) ^ Mix(~stream)) {}

uint64_t Random::Next() { return Mix(state_ += kGoldenGamma); }

uint64_t Random::Below(uint64_t n) {
  // The high half of a 128-bit product; the bias is below n / 2^64.
  return static_cast<uint64_t>((static_cast<unsigned __int128>(Next()) * n) >> 64);
}

double Random::Uniform() { return static_cast<double>((Next() >> 11) + 1) * 0x1p-53; }

double Random::Exponential() { return -std::log(Uniform()); }

double Random::Normal() {
  const double radius = std::sqrt(-2 * std::log(Uniform()));
  return radius * std::cos(2 * std::numbers::pi * Uniform());
}

Arrivals::Arrivals(Process process, double rate, uint64_t seed)
    : process_(process), rate_(rate), random_(seed, /*stream=*/0xa221) {}

double Arrivals::Next() {
  if (process_ == Process::kConstant) return static_cast<double>(num_arrivals_++) / rate_;
  return now_s_ += random_.Exponential() / rate_;
}

}  // namespace latentd
