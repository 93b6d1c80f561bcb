#include "engine/model/quantization.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "engine/status.h"

namespace latentd {
namespace {

// sign(1) exponent(4, bias 7) mantissa(3); exponent 0 is subnormal.
constexpr float DecodeE4m3(uint8_t code) {
  const int exponent = (code >> 3) & 0xf;
  const int mantissa = code & 0x7;
  float value = exponent == 0 ? mantissa / 8.0f : 1.0f + mantissa / 8.0f;
  for (int i = std::max(exponent, 1); i < 7; ++i) value *= 0.5f;
  for (int i = 7; i < exponent; ++i) value *= 2.0f;
  if (exponent == 0xf && mantissa == 0x7) value = std::numeric_limits<float>::quiet_NaN();
  return (code & 0x80) ? -value : value;
}

constexpr std::array<float, 256> MakeE4m3Values() {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) values[code] = DecodeE4m3(static_cast<uint8_t>(code));
  return values;
}

}  // namespace

constinit const std::array<float, 256> kE4m3Values = MakeE4m3Values();

uint8_t FloatToE4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7f;
  if (magnitude >= kE4m3Max) return sign | 0x7e;
  // The smallest step at this size: 2^-9 for subnormals, 2^(exponent - 3) above.
  int exponent = 0;
  std::frexp(magnitude, &exponent);  // magnitude = m * 2^exponent with m in [0.5, 1)
  const int step = std::max(exponent - 1, -6) - 3;
  // nearbyint rounds ties to even, and the code's parity is the mantissa's.
  const float rounded = std::ldexp(std::nearbyint(std::ldexp(magnitude, -step)), step);
  const auto* begin = kE4m3Values.data();
  return sign | static_cast<uint8_t>(std::lower_bound(begin, begin + 0x7f, rounded) - begin);
}

void ToFloat(const TensorView& tensor, float* out) {
  const int64_t n = tensor.num_elements();
  if (tensor.dtype == DType::kF32) {
    std::memcpy(out, tensor.data, static_cast<size_t>(n) * sizeof(float));
    return;
  }
  LATENTD_CHECK(tensor.dtype == DType::kBF16);
  const auto* in = reinterpret_cast<const uint16_t*>(tensor.data);
  for (int64_t i = 0; i < n; ++i) out[i] = Bf16ToFloat(in[i]);
}

void Dequantize(const LinearWeight& linear, const std::optional<Fp8Quantization>& quantization,
                int64_t row_begin, int64_t row_end, float* out) {
  const int64_t cols = linear.weight.shape[1];
  if (linear.weight.dtype != DType::kF8E4M3) {
    TensorView rows = linear.weight;
    rows.shape[0] = row_end - row_begin;
    rows.data += static_cast<size_t>(row_begin * cols) * DTypeBytes(rows.dtype);
    return ToFloat(rows, out);
  }
  LATENTD_CHECK(quantization.has_value() && !linear.scale_inv.empty());
  const auto* codes = reinterpret_cast<const uint8_t*>(linear.weight.data);
  const auto* scales = reinterpret_cast<const float*>(linear.scale_inv.data);
  const int64_t scale_cols = linear.scale_inv.shape[1];
  for (int64_t row = row_begin; row < row_end; ++row) {
    const float* row_scales = scales + row / quantization->block_rows * scale_cols;
    for (int64_t begin = 0; begin < cols; begin += quantization->block_cols) {
      const float scale = row_scales[begin / quantization->block_cols];
      const int64_t end = std::min<int64_t>(begin + quantization->block_cols, cols);
      for (int64_t col = begin; col < end; ++col)
        *out++ = E4m3ToFloat(codes[row * cols + col]) * scale;
    }
  }
}

}  // namespace latentd
