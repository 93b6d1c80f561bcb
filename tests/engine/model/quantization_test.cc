#include "engine/model/quantization.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

namespace latentd {
namespace {

TEST(E4m3Test, KnownValues) {
  EXPECT_EQ(E4m3ToFloat(0x00), 0.0f);
  EXPECT_TRUE(std::signbit(E4m3ToFloat(0x80)));
  EXPECT_EQ(E4m3ToFloat(0x01), std::ldexp(1.0f, -9));  // the smallest subnormal
  EXPECT_EQ(E4m3ToFloat(0x07), std::ldexp(7.0f, -9));
  EXPECT_EQ(E4m3ToFloat(0x08), std::ldexp(1.0f, -6));  // the smallest normal
  EXPECT_EQ(E4m3ToFloat(0x38), 1.0f);
  EXPECT_EQ(E4m3ToFloat(0xb9), -1.125f);
  EXPECT_EQ(E4m3ToFloat(0x7e), kE4m3Max);
  EXPECT_EQ(E4m3ToFloat(0xfe), -kE4m3Max);
  EXPECT_TRUE(std::isnan(E4m3ToFloat(0x7f)));
  EXPECT_TRUE(std::isnan(E4m3ToFloat(0xff)));
}

TEST(E4m3Test, EveryCodeComesBack) {
  for (int code = 0; code < 256; ++code) {
    const float value = E4m3ToFloat(static_cast<uint8_t>(code));
    EXPECT_EQ(FloatToE4m3(value), code) << value;
  }
}

TEST(E4m3Test, RoundsToNearestTiesToEven) {
  // Every midpoint of two neighbours, and a hair to each side of it.
  for (int code = 0; code < 0x7e; ++code) {
    const float low = E4m3ToFloat(static_cast<uint8_t>(code));
    const float high = E4m3ToFloat(static_cast<uint8_t>(code + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(FloatToE4m3(middle), code % 2 == 0 ? code : code + 1) << middle;
    EXPECT_EQ(FloatToE4m3(std::nextafter(middle, 0.0f)), code);
    EXPECT_EQ(FloatToE4m3(std::nextafter(middle, 500.0f)), code + 1);
    EXPECT_EQ(FloatToE4m3(-middle), FloatToE4m3(middle) | 0x80);
  }
  EXPECT_EQ(FloatToE4m3(1e-30f), 0);
  EXPECT_EQ(FloatToE4m3(449.0f), 0x7e);
  EXPECT_EQ(FloatToE4m3(1e30f), 0x7e);
  EXPECT_EQ(FloatToE4m3(-std::numeric_limits<float>::infinity()), 0xfe);
}

TEST(Bf16Test, RoundsToNearestTiesToEven) {
  EXPECT_EQ(FloatToBf16(1.0f), 0x3f80);
  EXPECT_EQ(FloatToBf16(1.0f + 0x1p-8f), 0x3f80);      // a tie, down to even
  EXPECT_EQ(FloatToBf16(1.0f + 3 * 0x1p-8f), 0x3f82);  // a tie, up to even
  EXPECT_EQ(FloatToBf16(1.0f + 0x1p-8f + 0x1p-20f), 0x3f81);
  EXPECT_EQ(FloatToBf16(std::numeric_limits<float>::max()), 0x7f80);  // rounds to infinity
  EXPECT_EQ(Bf16ToFloat(FloatToBf16(-std::numeric_limits<float>::infinity())),
            -std::numeric_limits<float>::infinity());
  // A NaN whose payload lies in the bits that are cut off.
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(std::bit_cast<float>(0x7f800001u)))));
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = Bf16ToFloat(static_cast<uint16_t>(bits));
    if (!std::isnan(value)) {
      EXPECT_EQ(FloatToBf16(value), bits);
    }
  }
}

template <typename T>
TensorView View(DType dtype, std::vector<int64_t> shape, const std::vector<T>& data) {
  return {.dtype = dtype,
          .shape = std::move(shape),
          .data = reinterpret_cast<const std::byte*>(data.data())};
}

TEST(DequantizeTest, EdgeBlocks) {
  // 5 x 7 in blocks of 2 x 3: the last row and the last column of blocks are cut.
  constexpr int kRows = 5, kCols = 7;
  std::vector<uint8_t> codes(kRows * kCols);
  std::mt19937 random(1);
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random() % 0x7f);
  const std::vector<float> scales = {0.5f, 2, 3, 5, 7, 11, 13, 17, 19};
  LinearWeight linear;
  linear.weight = View(DType::kF8E4M3, {kRows, kCols}, codes);
  linear.scale_inv = View(DType::kF32, {3, 3}, scales);
  const Fp8Quantization fp8{.block_rows = 2, .block_cols = 3};

  std::vector<float> all(kRows * kCols);
  Dequantize(linear, fp8, 0, kRows, all.data());
  for (int row = 0; row < kRows; ++row) {
    for (int col = 0; col < kCols; ++col) {
      const int i = row * kCols + col;
      EXPECT_EQ(all[i], E4m3ToFloat(codes[i]) * scales[row / 2 * 3 + col / 3])
          << row << ", " << col;
    }
  }
  std::vector<float> rows(2 * kCols);
  Dequantize(linear, fp8, 3, 5, rows.data());
  EXPECT_TRUE(std::equal(rows.begin(), rows.end(), all.begin() + 3 * kCols));
}

TEST(DequantizeTest, Bf16AndF32) {
  const std::vector<float> values = {1, -2, 3.5f, 0.25f, 100, -0.0f};
  std::vector<uint16_t> bf16;
  for (float value : values) bf16.push_back(FloatToBf16(value));
  for (const TensorView& weight :
       {View(DType::kF32, {3, 2}, values), View(DType::kBF16, {3, 2}, bf16)}) {
    LinearWeight linear;
    linear.weight = weight;
    std::vector<float> out(4);
    Dequantize(linear, std::nullopt, 1, 3, out.data());
    EXPECT_EQ(out, std::vector<float>(values.begin() + 2, values.end()));
    std::vector<float> all(6);
    ToFloat(weight, all.data());
    EXPECT_EQ(all, values);
  }
}

}  // namespace
}  // namespace latentd
