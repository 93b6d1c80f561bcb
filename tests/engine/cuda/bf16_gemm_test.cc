#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/cuda/kernels/moe.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

std::vector<__nv_bfloat16> RandomBf16(uint32_t seed, size_t size, float sigma) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<__nv_bfloat16> values(size);
  constexpr size_t kPeriod = 1'000'003;  // a prime: rows do not repeat
  for (size_t i = 0; i < size; ++i) {
    values[i] = i < kPeriod ? __float2bfloat16(normal(random)) : values[i - kPeriod];
  }
  return values;
}

struct Problem {
  int n, k;
  std::vector<int> rows;  // of each group
  bool swiglu = false;
  bool grouped = true;
};

class Bf16GemmTest : public DeviceTest {};

TEST_F(Bf16GemmTest, IsTheSumInF64) {
  const Problem problems[] = {{16, 32, {1}},
                              {64, 64, {64}},
                              {4096, 512, {3}, false, false},
                              {48, 96, {65, 0, 1, 128, 63}},
                              {256, 256, {0, 0, 7, 0, 200, 1, 1, 0}, true},
                              {272, 160, {5, 130}, true},
                              {4096, 7168, {1, 8, 0, 70}, true},
                              {7168, 2048, {2, 2, 33}},
                              {128, 128, std::vector<int>(257, 1), true}};
  uint32_t seed = 1;
  for (const Problem& problem : problems) {
    SCOPED_TRACE(testing::Message()
                 << problem.n << " x " << problem.k << ", " << problem.rows.size() << " groups");
    const int groups = static_cast<int>(problem.rows.size()), n = problem.n, k = problem.k;
    std::vector<int32_t> offsets = {0};
    for (int rows : problem.rows) offsets.push_back(offsets.back() + rows);
    const int rows = offsets.back(), max_rows = problem.grouped ? rows + 70 : rows;
    const int width = problem.swiglu ? n / 2 : n;
    const int64_t stride = width + 8;
    auto x = RandomBf16(++seed, size_t(max_rows) * k, 1.0f);
    for (size_t i = size_t(rows) * k; i < x.size(); ++i) x[i] = __float2bfloat16(NAN);
    const auto weight = RandomBf16(++seed, size_t(groups) * n * k, 1.0f / std::sqrt(float(k)));
    DeviceArray<__nv_bfloat16> x_device(x), weight_device(weight), out(size_t(max_rows) * stride);
    DeviceArray<int32_t> offsets_device(offsets);
    const Bf16GemmArgs args = {
        .x = x_device.get(),
        .num_rows = max_rows,
        .weight = {.bf16 = weight_device.get(), .num_groups = groups, .n = n, .k = k},
        .group_offsets = problem.grouped ? offsets_device.get() : nullptr,
        .out = out.get(),
        .out_stride = stride,
        .swiglu = problem.swiglu};
    ASSERT_CUDA_OK(GroupedBf16Gemm(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
    const auto got = out.Get();
    std::mt19937 random(seed);
    for (int g = 0; g < groups; ++g) {
      for (int row = offsets[g]; row < offsets[g + 1]; ++row) {
        const auto dot = [&](int column) {
          double sum = 0;
          for (int i = 0; i < k; ++i) {
            sum += double{__bfloat162float(x[size_t(row) * k + i])} *
                   __bfloat162float(weight[(size_t(g) * n + column) * k + i]);
          }
          return sum;
        };
        // All columns of small problems, some of large ones.
        const int step = size_t(n) * k > 100000 ? 1 + static_cast<int>(random() % 97) : 1;
        for (int column = 0; column < width; column += step) {
          double expected;
          if (problem.swiglu) {
            const double gate = dot(column / 8 * 16 + column % 8),
                         up = dot(column / 8 * 16 + 8 + column % 8);
            expected = gate / (1 + std::exp(-gate)) * up;
          } else {
            expected = dot(column);
          }
          ASSERT_NEAR(__bfloat162float(got[row * stride + column]), expected,
                      0.005 * std::abs(expected) + 1e-4)
              << "row " << row << " column " << column;
        }
        for (int pad = width; pad < stride; ++pad) {
          ASSERT_TRUE(std::isnan(__bfloat162float(got[row * stride + pad])))
              << "written beyond the row's end";
        }
      }
    }
    for (int64_t i = rows * stride; i < int64_t{max_rows} * stride; ++i) {
      ASSERT_TRUE(std::isnan(__bfloat162float(got[i]))) << "written beyond the last row";
    }
  }
}

TEST_F(Bf16GemmTest, ARowDoesNotDependOnTheOthers) {
  constexpr int kN = 256, kK = 512, kRows = 100;
  const auto x = RandomBf16(3, kRows * kK, 1.0f), weight = RandomBf16(4, 2 * kN * kK, 0.1f);
  DeviceArray<__nv_bfloat16> x_device(x), weight_device(weight), together(kRows * kN),
      alone(kRows * kN);
  DeviceArray<int32_t> both(std::vector<int32_t>{0, 40, kRows});
  Bf16GemmArgs args = {.x = x_device.get(),
                       .num_rows = kRows,
                       .weight = {.bf16 = weight_device.get(), .num_groups = 2, .n = kN, .k = kK},
                       .group_offsets = both.get(),
                       .out = together.get(),
                       .out_stride = kN};
  ASSERT_CUDA_OK(GroupedBf16Gemm(args, nullptr));
  for (int row = 0; row < kRows; ++row) {
    args.x = x_device.get() + row * kK;
    args.num_rows = 1;
    args.weight.num_groups = 1;
    args.weight.bf16 = weight_device.get() + (row < 40 ? 0 : kN * kK);
    args.group_offsets = nullptr;
    args.out = alone.get() + row * kN;
    ASSERT_CUDA_OK(GroupedBf16Gemm(args, nullptr));
  }
  ASSERT_CUDA_OK(cudaDeviceSynchronize());
  const auto a = together.Get(), b = alone.Get();
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])), 0);
}

TEST_F(Bf16GemmTest, BadArgumentsAreRefused) {
  EXPECT_EQ(GroupedBf16Gemm({}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace latentd
