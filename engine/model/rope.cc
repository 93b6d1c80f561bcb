#include "engine/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace latentd {
namespace {

// The dim whose wavelength makes `rotations` turns within the original context.
double CorrectionDim(double rotations, int dim, double theta, double original_positions) {
  return dim * std::log(original_positions / (rotations * 2.0 * std::numbers::pi)) /
         (2.0 * std::log(theta));
}

// [dim / 2]
std::vector<float> InverseFrequencies(const ModelConfig& config) {
  const int dim = config.qk_rope_head_dim;
  std::vector<float> frequencies(dim / 2);
  double low = 0.0, high = 0.0;
  if (config.yarn) {
    const YarnScaling& yarn = *config.yarn;
    low = CorrectionDim(yarn.beta_fast, dim, config.rope_theta,
                        yarn.original_max_position_embeddings);
    high = CorrectionDim(yarn.beta_slow, dim, config.rope_theta,
                         yarn.original_max_position_embeddings);
    if (yarn.truncate) {
      low = std::floor(low);
      high = std::ceil(high);
    }
    low = std::max(low, 0.0);
    high = std::min(high, dim - 1.0);
    if (low == high) high += 0.001;
  }
  for (int i = 0; i < dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(dim);
    const float wavelength = static_cast<float>(
        std::pow(static_cast<double>(config.rope_theta), static_cast<double>(exponent)));
    frequencies[i] = 1.0f / wavelength;
    if (config.yarn) {
      // 1 where the frequency is interpolated, 0 where it is kept.
      const float ramp = std::clamp(
          (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low), 0.0f,
          1.0f);
      const float kept = 1.0f - ramp;
      frequencies[i] =
          1.0f / (config.yarn->factor * wavelength) * (1.0f - kept) + frequencies[i] * kept;
    }
  }
  return frequencies;
}

}  // namespace

Rope::Rope(const ModelConfig& config, int32_t num_positions)
    : half_(config.qk_rope_head_dim / 2), interleave_(config.rope_interleave) {
  const std::vector<float> frequencies = InverseFrequencies(config);
  const float scale = config.yarn ? config.yarn->cos_sin_scale() : 1.0f;
  cos_.resize(static_cast<size_t>(num_positions) * half_);
  sin_.resize(cos_.size());
  for (int32_t position = 0; position < num_positions; ++position) {
    for (int i = 0; i < half_; ++i) {
      const float angle = static_cast<float>(position) * frequencies[i];
      const size_t at = static_cast<size_t>(position) * half_ + i;
      cos_[at] = static_cast<float>(std::cos(static_cast<double>(angle))) * scale;
      sin_[at] = static_cast<float>(std::sin(static_cast<double>(angle))) * scale;
    }
  }
}

void Rope::Apply(const float* x, int32_t position, float* out) const {
  const float* cos = cos_.data() + static_cast<size_t>(position) * half_;
  const float* sin = sin_.data() + static_cast<size_t>(position) * half_;
  for (int i = 0; i < half_; ++i) {
    const float a = interleave_ ? x[2 * i] : x[i];
    const float b = interleave_ ? x[2 * i + 1] : x[half_ + i];
    out[i] = a * cos[i] - b * sin[i];
    out[half_ + i] = b * cos[i] + a * sin[i];
  }
}

}  // namespace latentd
