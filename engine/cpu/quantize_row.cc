#include "engine/cpu/quantize_row.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "engine/model/quantization.h"

namespace latentd {
namespace {

// E4m3ToFloat(FloatToE4m3(v)) for |v| <= 448, without a branch.
float RoundToE4m3(float v) {
  constexpr uint32_t kExponent = 0x7f800000u;
  constexpr uint32_t kLeastExponent = (127u - 6) << 23;  // below 2^-6 e4m3 is subnormal
  const uint32_t exponent = std::max(std::bit_cast<uint32_t>(v) & kExponent, kLeastExponent);
  // Three bits of mantissa: v's last one has the worth of the last bit of 1.5 * 2^(exponent + 20).
  const float magic = 1.5f * std::bit_cast<float>(exponent + (20u << 23));
  return (v + magic) - magic;
}

}  // namespace

float ActivationScale(float amax, bool power_of_two) {
  const float scale = std::max(amax, 1e-10f) / kE4m3Max;
  if (!power_of_two) return scale;
  int exponent = 0;
  const float mantissa = std::frexp(scale, &exponent);  // [0.5, 1)
  return std::ldexp(1.0f, mantissa == 0.5f ? exponent - 1 : exponent);
}

void QuantizeRow(const float* x, int n, const ActivationQuantization& how, float* out) {
  for (int begin = 0; begin < n; begin += how.group) {
    const int end = std::min(begin + how.group, n);
    float amax = 0.0f;
    for (int i = begin; i < end; ++i) amax = std::max(amax, std::fabs(x[i]));
    const float scale = ActivationScale(amax, how.power_of_two_scales);
    for (int i = begin; i < end; ++i) {
      // amax / scale may round to a little more than 448.
      const float v = std::clamp(x[i] / scale, -kE4m3Max, kE4m3Max);
      out[i] = RoundToE4m3(v) * scale;
    }
  }
}

void QuantizeCacheRow(float* latents, int num_latents, float* rotated, int num_rotated) {
  QuantizeRow(latents, num_latents, {.group = num_latents, .power_of_two_scales = true}, latents);
  for (int i = 0; i < num_rotated; ++i) rotated[i] = Bf16ToFloat(FloatToBf16(rotated[i]));
}

}  // namespace latentd
