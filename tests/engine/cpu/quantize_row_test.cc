#include "engine/cpu/quantize_row.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "engine/cpu/gemm.h"
#include "engine/model/quantization.h"
#include "tests/engine/cpu/harness.h"

namespace latentd {
namespace {

std::vector<float> Quantized(const std::vector<float>& x, const ActivationQuantization& how) {
  std::vector<float> out(x.size());
  QuantizeRow(x.data(), static_cast<int>(x.size()), how, out.data());
  return out;
}

// Random values of very different sizes, some of them zero.
std::vector<float> SomeValues(int n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> exponent(-12, 12);
  std::vector<float> values(n);
  for (float& v : values) {
    v = random() % 16 == 0 ? 0.0f : std::ldexp(normal(random), exponent(random));
  }
  return values;
}

TEST(QuantizeRowTest, OneGroupByHand) {
  // The largest magnitude, 896, makes the scale 2: values are multiples of 2 * (a step of e4m3).
  EXPECT_EQ(ActivationScale(896.0f, false), 2.0f);
  const std::vector<float> x = {896.0f, -896.0f, 0.0f,   2.0f,    2.125f,   2.1251f,   2.375f,
                                34.0f,  -33.0f,  400.0f, 415.99f, 0.00390f, 0.0019531f};
  const std::vector<float> expected = {896.0f, -896.0f, 0.0f,   2.0f,   2.0f,        2.25f, 2.5f,
                                       32.0f,  -32.0f,  384.0f, 416.0f, 0.00390625f, 0.0f};
  EXPECT_EQ(Quantized(x, {.group = 128}), expected);
}

// One scale for all latents, a power of two: what the FP8 cache of a GPU holds of them, which bf16
// holds exactly.
TEST(QuantizeRowTest, CacheRows) {
  std::vector<float> latents = SomeValues(512, 5), rotated = SomeValues(64, 6);
  latents[300] = 3.0f * (1 << 13);
  const std::vector<float> latents_before = latents, rotated_before = rotated;
  QuantizeCacheRow(latents.data(), 512, rotated.data(), 64);
  const float scale = ActivationScale(3.0f * (1 << 13), true);
  for (int i = 0; i < 512; ++i) {
    EXPECT_EQ(latents[i], E4m3ToFloat(FloatToE4m3(latents_before[i] / scale)) * scale) << i;
    EXPECT_EQ(latents[i], Bf16ToFloat(FloatToBf16(latents[i]))) << i;
  }
  for (int i = 0; i < 64; ++i)
    EXPECT_EQ(rotated[i], Bf16ToFloat(FloatToBf16(rotated_before[i]))) << i;
}

TEST(QuantizeRowTest, Scales) {
  EXPECT_EQ(ActivationScale(448.0f, false), 1.0f);
  EXPECT_EQ(ActivationScale(100.0f, false), 100.0f / 448.0f);
  EXPECT_EQ(ActivationScale(0.0f, false), 1e-10f / 448.0f);
  EXPECT_EQ(ActivationScale(448.0f, true), 1.0f);
  EXPECT_EQ(ActivationScale(std::nextafter(448.0f, 1000.0f), true), 2.0f);
  EXPECT_EQ(ActivationScale(449.0f, true), 2.0f);
  EXPECT_EQ(ActivationScale(300.0f, true), 1.0f);
  EXPECT_EQ(ActivationScale(28.0f, true), 0.0625f);
  for (float amax : {1e-20f, 1e-10f, 0.3f, 7.0f, 1e6f, 3e38f}) {
    const float scale = ActivationScale(amax, false), power = ActivationScale(amax, true);
    int exponent = 0;
    EXPECT_EQ(std::frexp(power, &exponent), 0.5f) << amax;
    EXPECT_GE(power, scale);
    EXPECT_LT(power, 2 * scale);
  }
}

// What is stored is what FloatToE4m3 makes of x / scale, bit for bit.
TEST(QuantizeRowTest, RoundsAsE4m3) {
  for (bool power_of_two : {false, true}) {
    for (uint32_t seed = 0; seed < 200; ++seed) {
      const std::vector<float> x = SomeValues(128, seed);
      float amax = 0;
      for (float v : x) amax = std::max(amax, std::abs(v));
      const float scale = ActivationScale(amax, power_of_two);
      const std::vector<float> actual =
          Quantized(x, {.group = 128, .power_of_two_scales = power_of_two});
      for (size_t i = 0; i < x.size(); ++i) {
        ASSERT_EQ(actual[i], E4m3ToFloat(FloatToE4m3(x[i] / scale)) * scale) << x[i];
      }
    }
  }
}

// Every e4m3 number stays itself, and so do the values between two of them where they belong.
TEST(QuantizeRowTest, EveryE4m3Number) {
  for (int code = 0; code < 0x7f; ++code) {
    const float value = E4m3ToFloat(static_cast<uint8_t>(code));
    EXPECT_EQ(Quantized({448.0f, value, -value}, {}), (std::vector<float>{448.0f, value, -value}));
    if (code == 0x7e) continue;
    const float next = E4m3ToFloat(static_cast<uint8_t>(code + 1)), tie = (value + next) / 2;
    const float even = code % 2 == 0 ? value : next;
    EXPECT_EQ(Quantized({448.0f, tie, std::nextafter(tie, 0.0f), std::nextafter(tie, 1e9f)}, {}),
              (std::vector<float>{448.0f, even, value, next}));
  }
}

TEST(QuantizeRowTest, GroupsAreApartAndTheLastMayBeShort) {
  const std::vector<float> x = SomeValues(300, 7);
  const std::vector<float> all = Quantized(x, {.group = 128});
  for (size_t begin : {0, 128, 256}) {
    const size_t end = std::min<size_t>(begin + 128, x.size());
    const std::vector<float> alone = Quantized({x.begin() + begin, x.begin() + end}, {});
    EXPECT_EQ(alone, std::vector<float>(all.begin() + begin, all.begin() + end));
  }
}

TEST(QuantizeRowTest, ZerosAndNaN) {
  EXPECT_EQ(Quantized({0.0f, 0.0f}, {}), (std::vector<float>{0.0f, 0.0f}));
  const std::vector<float> out =
      Quantized({1.0f, std::numeric_limits<float>::quiet_NaN(), 2.0f}, {});
  EXPECT_FALSE(std::isnan(out[0]));
  EXPECT_TRUE(std::isnan(out[1]));
  EXPECT_EQ(out[2], 2.0f);
}

// In one call some products read an input rounded, others as it is.
TEST(QuantizeRowTest, AProductRoundsItsInputWhenItsMatrixSays) {
  const LoadedModel model = LoadModel("tests/golden/variants/fp8");
  const LinearWeight& weight = model.weights.layers[0].o_proj;
  const int n = static_cast<int>(weight.weight.shape[0]);
  const int k = static_cast<int>(weight.weight.shape[1]);
  const MatrixPart part{.linear = &weight, .row_begin = 0, .num_rows = n};
  constexpr int kRows = 13;
  const int stride = k + 2 * kRowPadding;
  AlignedVector<float> x(size_t{kRows} * stride), rounded(x.size());
  const ActivationQuantization how{.group = 128};
  for (int row = 0; row < kRows; ++row) {
    const std::vector<float> values = SomeValues(k, row);
    std::copy(values.begin(), values.end(), x.begin() + row * stride);
    QuantizeRow(values.data(), k, how, rounded.data() + row * stride);
  }
  ThreadPool pool(2);
  Arena arena;
  const PackedMatrix plain = Pack({part}, model.config.quantization, pool, arena);
  PackedMatrix rounding = plain;
  rounding.quantize_input = how;
  for (const Kernels* kernels : SupportedKernels()) {
    Gemm gemm(*kernels, pool);
    std::vector<float> expected_plain(kRows * n), expected_rounded(kRows * n);
    gemm.Run({.x = x.data(), .stride = stride, .rows = kRows, .k = k}, plain, expected_plain.data(),
             n);
    gemm.Run({.x = rounded.data(), .stride = stride, .rows = kRows, .k = k}, plain,
             expected_rounded.data(), n);
    EXPECT_NE(expected_plain, expected_rounded);
    std::vector<float> a(kRows * n), b(kRows * n), c(kRows * n);
    gemm.Run({{.x = x.data(), .stride = stride, .rows = kRows, .k = k},
              {.x = x.data(), .stride = stride, .rows = kRows, .k = k}},
             {{.input = 0, .matrix = &rounding, .out = a.data(), .out_stride = n},
              {.input = 0, .matrix = &plain, .out = b.data(), .out_stride = n},
              {.input = 1, .matrix = &rounding, .out = c.data(), .out_stride = n}});
    EXPECT_EQ(a, expected_rounded) << kernels->name;
    EXPECT_EQ(b, expected_plain) << kernels->name;
    EXPECT_EQ(c, expected_rounded) << kernels->name;
  }
}

}  // namespace
}  // namespace latentd
