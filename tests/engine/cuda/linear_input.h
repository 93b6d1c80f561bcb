#ifndef LATENTD_TESTS_ENGINE_CUDA_LINEAR_INPUT_H_
#define LATENTD_TESTS_ENGINE_CUDA_LINEAR_INPUT_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "engine/cuda/kernels/tensors.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {

// Even between -2 sigma and 2 sigma.
inline std::vector<float> RandomFloats(size_t size, float mean, float sigma, uint32_t seed) {
  std::vector<float> values(size);
  uint64_t state = seed;
  for (float& value : values) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    value = mean + 4 * sigma * (static_cast<float>(state >> 40) * 0x1p-24f - 0.5f);
  }
  return values;
}

inline std::vector<__nv_bfloat16> RandomBf16(size_t size, float sigma, uint32_t seed) {
  const std::vector<float> floats = RandomFloats(size, 0, sigma, seed);
  std::vector<__nv_bfloat16> values(size);
  for (size_t i = 0; i < size; ++i) values[i] = __float2bfloat16(floats[i]);
  return values;
}

// The rule of norm.h, once more.
inline float ReferenceScale(float amax, bool power_of_two) {
  const float scale = std::max(amax, 1e-10f) / 448.0f;
  return power_of_two ? std::exp2(std::ceil(std::log2(static_cast<double>(scale)))) : scale;
}

// A LinearInput on the device, poisoned, with rows of scales longer than needed.
class LinearOutput {
 public:
  LinearOutput(int rows, int columns, bool with_fp8, bool with_bf16)
      : rows_(rows),
        columns_(columns),
        stride_((rows + 3) / 4 * 4 + 4),
        fp8_(with_fp8 ? static_cast<size_t>(rows) * columns : 0),
        scales_(with_fp8 ? static_cast<size_t>(columns / kQuantGroup) * stride_ : 0),
        bf16_(with_bf16 ? static_cast<size_t>(rows) * columns : 0) {
    if (with_fp8) input_.fp8 = {fp8_.get(), scales_.get(), stride_};
    if (with_bf16) input_.bf16 = bf16_.get();
  }
  const LinearInput& input() const { return input_; }

  // Row `row` is `values` [columns], quantised. `exact`: the values are known to the last bit.
  void ExpectRow(int row, const std::vector<double>& values, bool power_of_two, bool exact) {
    for (int column = 0; column < columns_; column += kQuantGroup) {
      const int end = std::min(column + kQuantGroup, columns_);
      ExpectGroup(row, column / kQuantGroup, {values.begin() + column, values.begin() + end},
                  power_of_two, exact);
      if (testing::Test::HasFatalFailure()) return;
    }
  }

  // The same of the columns from 128 * `group` on.
  void ExpectGroup(int row, int group, const std::vector<double>& values, bool power_of_two,
                   bool exact) {
    Fetch();
    float amax = 0;
    for (const double value : values) amax = std::max(amax, std::abs(static_cast<float>(value)));
    const float want_scale = ReferenceScale(amax, power_of_two);
    float scale = 0;
    if (input_.fp8.data != nullptr) {
      scale = host_scales_[group * stride_ + row];
      if (exact) {
        ASSERT_EQ(scale, want_scale) << row << ", " << group;
      } else if (power_of_two) {
        int exponent = 0;
        ASSERT_EQ(std::frexp(scale, &exponent), 0.5f) << row << ", " << group << ": " << scale;
        ASSERT_GT(scale, ReferenceScale(amax, false) * (1 - 1e-5)) << row << ", " << group;
        ASSERT_LT(scale, ReferenceScale(amax, false) * (2 + 1e-5)) << row << ", " << group;
      } else {
        ASSERT_NEAR(scale, want_scale, want_scale * 1e-5) << row << ", " << group;
      }
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const double want = values[i];
      const size_t at = At(row, group * kQuantGroup + static_cast<int>(i));
      if (input_.bf16 != nullptr) {
        ASSERT_NEAR(__bfloat162float(host_bf16_[at]), want, std::abs(want) * 0x1.02p-8 + 2e-5)
            << row << ", " << group << ", " << i;
      }
      if (input_.fp8.data == nullptr) continue;
      if (exact) {
        const __nv_fp8_e4m3 want_code(static_cast<float>(want) / want_scale);
        ASSERT_EQ(int{host_fp8_[at].__x}, int{want_code.__x})
            << row << ", " << group << ", " << i << ": " << want;
      } else {
        // Half a step of three bits of mantissa, or of the smallest step; and what the values' own
        // rounding may add.
        const double got = static_cast<double>(static_cast<float>(host_fp8_[at])) * scale;
        ASSERT_NEAR(got, want, std::abs(want) * (0x1p-4 + 1e-5) + scale * 0x1.01p-10 + 2e-5)
            << row << ", " << group << ", " << i << ", scale " << scale;
      }
    }
  }

  // No value is a NaN.
  void ExpectWritten() {
    Fetch();
    for (size_t i = 0; i < host_bf16_.size(); ++i)
      ASSERT_FALSE(std::isnan(__bfloat162float(host_bf16_[i]))) << i;
    for (size_t i = 0; i < host_fp8_.size(); ++i) ASSERT_NE(host_fp8_[i].__x & 0x7f, 0x7f) << i;
    for (size_t i = 0; i < host_scales_.size(); ++i)
      ASSERT_TRUE(static_cast<int64_t>(i) % stride_ >= rows_ || !std::isnan(host_scales_[i])) << i;
  }

  // Row `row` has the same bits as row `other_row` of `other`.
  void ExpectSameRow(int row, LinearOutput& other, int other_row) {
    Fetch();
    other.Fetch();
    for (int column = 0; column < columns_; ++column) {
      const size_t a = At(row, column), b = other.At(other_row, column);
      if (input_.bf16 != nullptr) {
        ASSERT_EQ(Bits(host_bf16_[a]), Bits(other.host_bf16_[b])) << row << ", " << column;
      }
      if (input_.fp8.data == nullptr) continue;
      ASSERT_EQ(int{host_fp8_[a].__x}, int{other.host_fp8_[b].__x}) << row << ", " << column;
      const int group = column / kQuantGroup;
      ASSERT_EQ(host_scales_[group * stride_ + row],
                other.host_scales_[group * other.stride_ + other_row])
          << row << ", " << group;
    }
  }

  // Rows from `first` on, and the scales between the rows' groups, were not written.
  void ExpectPoisonFrom(int first) {
    Fetch();
    for (int row = first; row < rows_ && input_.fp8.data != nullptr; ++row)
      for (int column = 0; column < columns_; ++column)
        ASSERT_EQ(int{host_fp8_[At(row, column)].__x}, 0xff) << row << ", " << column;
    for (size_t i = 0; i < host_scales_.size(); ++i)
      ASSERT_TRUE(static_cast<int64_t>(i) % stride_ < first || std::isnan(host_scales_[i])) << i;
  }

 private:
  static uint16_t Bits(__nv_bfloat16 value) { return __nv_bfloat16_raw(value).x; }
  size_t At(int row, int column) const { return static_cast<size_t>(row) * columns_ + column; }
  void Fetch() {
    if (fetched_) return;
    host_fp8_ = fp8_.Get();
    host_scales_ = scales_.Get();
    host_bf16_ = bf16_.Get();
    fetched_ = true;
  }

  int rows_, columns_;
  int64_t stride_;
  DeviceArray<__nv_fp8_e4m3> fp8_;
  DeviceArray<float> scales_;
  DeviceArray<__nv_bfloat16> bf16_;
  LinearInput input_;
  bool fetched_ = false;
  std::vector<__nv_fp8_e4m3> host_fp8_;
  std::vector<float> host_scales_;
  std::vector<__nv_bfloat16> host_bf16_;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_LINEAR_INPUT_H_
