#ifndef LATENTD_ENGINE_MODEL_QUANTIZATION_H_
#define LATENTD_ENGINE_MODEL_QUANTIZATION_H_

#include <array>
#include <bit>
#include <cstdint>
#include <optional>

#include "engine/model/config.h"
#include "engine/model/safetensors.h"
#include "engine/model/weights.h"

namespace latentd {

// bf16 is the upper half of an fp32.
inline float Bf16ToFloat(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

// Rounds to nearest, ties to even; a NaN stays one.
inline uint16_t FloatToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline constexpr float kE4m3Max = 448.0f;

// The 256 values of FP8 e4m3fn: no infinities, NaN at 0x7f and 0xff.
extern const std::array<float, 256> kE4m3Values;

inline float E4m3ToFloat(uint8_t code) { return kE4m3Values[code]; }

// Rounds to nearest, ties to even; beyond +-448 it saturates; a NaN stays one.
uint8_t FloatToE4m3(float value);

// Writes the elements of an F32 or BF16 tensor to `out` [num_elements] f32.
void ToFloat(const TensorView& tensor, float* out);

// Writes rows [row_begin, row_end) of a projection to `out` [row_end - row_begin, in_features] f32:
// w * scale_inv of its block when it is FP8. `quantization` is the config's.
void Dequantize(const LinearWeight& linear, const std::optional<Fp8Quantization>& quantization,
                int64_t row_begin, int64_t row_end, float* out);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_QUANTIZATION_H_
