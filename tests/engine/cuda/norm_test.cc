#include "engine/cuda/kernels/norm.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/linear_input.h"

namespace latentd {
namespace {

enum class Source { kNone, kEmbed, kDelta, kExperts };

struct NormCase {
  int num_rows;
  int hidden_size;
  Source source;
  int num_choices = 0;
  bool gather = false;
  bool power_of_two_scales = false;
  bool fp8 = true;
  bool bf16 = true;
};

std::string Name(const testing::TestParamInfo<NormCase>& info) {
  const NormCase& c = info.param;
  static constexpr const char* kSources[] = {"None", "Embed", "Delta", "Experts"};
  return std::to_string(c.num_rows) + "x" + std::to_string(c.hidden_size) +
         kSources[static_cast<int>(c.source)] +
         (c.num_choices > 0 ? std::to_string(c.num_choices) : "") + (c.gather ? "Gather" : "") +
         (c.power_of_two_scales ? "Pow2" : "") + (c.fp8 ? "Fp8" : "") + (c.bf16 ? "Bf16" : "");
}

// All inputs of one case, and a run over some of its rows.
class Inputs {
 public:
  explicit Inputs(const NormCase& c)
      : c_(c),
        num_tokens_(c.gather ? 2 * c.num_rows + 1 : c.num_rows),
        weight_(RandomFloats(c.hidden_size, 1, 0.2f, 1)),
        residual_(RandomFloats(Size(num_tokens_), 0, 3, 2)),
        x_(RandomBf16(Size(kNumRowsOfX), 1.5f, 3)),
        weight_device_(weight_),
        x_device_(x_) {
    std::mt19937 random(4);
    for (int i = 0; i < c.num_rows; ++i) rows_.push_back(c.gather ? 2 * i + 1 : i);
    for (int i = 0; i < c.num_rows; ++i) tokens_.push_back(random() % kNumRowsOfX);
    for (int i = 0; i < num_tokens_ * c.num_choices; ++i) {
      row_of_.push_back(random() % 4 == 0 ? -1 : random() % kNumRowsOfX);
      // What a choice without a row weighs is no one's business.
      weights_.push_back(row_of_.back() < 0 ? std::numeric_limits<float>::quiet_NaN()
                                            : static_cast<float>(random() % 1000) / 400 - 0.5f);
    }
    if (c.source == Source::kDelta) {
      // One row a token.
      x_ = RandomBf16(Size(num_tokens_), 1.5f, 5);
      delta_device_ = std::make_unique<DeviceArray<__nv_bfloat16>>(x_);
    }
  }

  // Rows [first, first + count) into `out`; returns the residual stream.
  std::vector<float> Run(int first, int count, const LinearInput& out) {
    DeviceArray<float> residual(residual_);
    const DeviceArray<int32_t> rows(
        std::vector<int32_t>(rows_.begin() + first, rows_.begin() + first + count));
    const DeviceArray<int32_t> tokens(
        std::vector<int32_t>(tokens_.begin() + first, tokens_.begin() + first + count));
    DeviceArray<int32_t> row_of(row_of_);
    DeviceArray<float> weights(weights_);
    AddNormArgs args;
    args.num_rows = count;
    args.hidden_size = c_.hidden_size;
    args.eps = kEps;
    args.weight = weight_device_.get();
    args.residual = residual.get();
    args.out = out;
    args.power_of_two_scales = c_.power_of_two_scales;
    // Without a list, row 0 of the run must be the token `first`.
    if (c_.gather || first > 0) args.rows = rows.get();
    switch (c_.source) {
      case Source::kNone:
        break;
      case Source::kEmbed:
        args.tokens = tokens.get();
        args.embed = x_device_.get();
        break;
      case Source::kDelta:
        args.delta = delta_device_->get();
        break;
      case Source::kExperts:
        args.expert_out = x_device_.get();
        args.routing.num_choices = c_.num_choices;
        args.routing.row_of = row_of.get();
        args.routing.weights = weights.get();
        break;
    }
    EXPECT_EQ(AddNorm(args, nullptr), cudaSuccess);
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    return residual.Get();
  }

  // Row i of the result, and of the residual stream after it.
  void Reference(int i, std::vector<double>& normed, std::vector<double>& residual) const {
    const int64_t token = rows_[i];
    residual.assign(c_.hidden_size, 0);
    double square_sum = 0;
    for (int column = 0; column < c_.hidden_size; ++column) {
      double value = residual_[token * c_.hidden_size + column];
      if (c_.source == Source::kEmbed) value = X(tokens_[i], column);
      if (c_.source == Source::kDelta) value += X(token, column);
      for (int j = 0; j < c_.num_choices; ++j) {
        const int64_t choice = token * c_.num_choices + j;
        if (row_of_[choice] >= 0) value += weights_[choice] * X(row_of_[choice], column);
      }
      residual[column] = value;
      square_sum += value * value;
    }
    normed = residual;
    const double factor = 1 / std::sqrt(square_sum / c_.hidden_size + kEps);
    for (int column = 0; column < c_.hidden_size; ++column)
      normed[column] *= factor * weight_[column];
  }

  const std::vector<float>& residual() const { return residual_; }
  const std::vector<int32_t>& rows() const { return rows_; }

 private:
  static constexpr float kEps = 1e-6f;
  static constexpr int kNumRowsOfX = 37;  // of the embedding, of the experts

  size_t Size(int rows) const { return static_cast<size_t>(rows) * c_.hidden_size; }
  double X(int64_t row, int column) const {
    return __bfloat162float(x_[row * c_.hidden_size + column]);
  }

  NormCase c_;
  int num_tokens_;
  std::vector<float> weight_;
  std::vector<float> residual_;
  std::vector<__nv_bfloat16> x_;
  std::vector<int32_t> rows_, tokens_, row_of_;
  std::vector<float> weights_;
  DeviceArray<float> weight_device_;
  DeviceArray<__nv_bfloat16> x_device_;
  std::unique_ptr<DeviceArray<__nv_bfloat16>> delta_device_;
};

class AddNormTest : public DeviceTest, public testing::WithParamInterface<NormCase> {};

TEST_P(AddNormTest, IsTheReferences) {
  const NormCase c = GetParam();
  Inputs inputs(c);
  LinearOutput out(c.num_rows, c.hidden_size, c.fp8, c.bf16);
  const std::vector<float> residual = inputs.Run(0, c.num_rows, out.input());
  std::vector<double> normed, want_residual;
  std::vector<bool> updated(residual.size() / c.hidden_size, false);
  for (int i = 0; i < c.num_rows; ++i) {
    inputs.Reference(i, normed, want_residual);
    out.ExpectRow(i, normed, c.power_of_two_scales, /*exact=*/false);
    if (HasFatalFailure()) return;
    const int64_t token = inputs.rows()[i];
    updated[token] = true;
    for (int column = 0; column < c.hidden_size; ++column) {
      ASSERT_NEAR(residual[token * c.hidden_size + column], want_residual[column],
                  1e-5 + 1e-6 * std::abs(want_residual[column]))
          << i << ", " << column;
    }
  }
  for (size_t token = 0; token < updated.size(); ++token) {
    for (int column = 0; column < c.hidden_size && !updated[token]; ++column) {
      const size_t at = token * c.hidden_size + column;
      ASSERT_EQ(residual[at], inputs.residual()[at]) << token << ", " << column;
    }
  }
}

TEST_P(AddNormTest, ARowAloneIsTheSame) {
  const NormCase c = GetParam();
  Inputs inputs(c);
  LinearOutput all(c.num_rows, c.hidden_size, c.fp8, c.bf16);
  const std::vector<float> residual = inputs.Run(0, c.num_rows, all.input());
  for (const int i : {0, c.num_rows / 3, c.num_rows - 1}) {
    // Where `rows` is not given it stands in for the row's number, but not for `delta`'s or
    // the experts': those go by token.
    LinearOutput one(1, c.hidden_size, c.fp8, c.bf16);
    const std::vector<float> residual_of_one = inputs.Run(i, 1, one.input());
    one.ExpectSameRow(0, all, i);
    if (HasFatalFailure()) return;
    const int64_t token = inputs.rows()[i];
    for (int column = 0; column < c.hidden_size; ++column) {
      const size_t at = token * c.hidden_size + column;
      ASSERT_EQ(residual_of_one[at], residual[at]) << i << ", " << column;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, AddNormTest,
    testing::Values(
        NormCase{1, 256, Source::kNone}, NormCase{3, 256, Source::kEmbed},
        NormCase{64, 256, Source::kExperts, 3}, NormCase{300, 256, Source::kDelta},
        NormCase{300, 256, Source::kExperts, 3}, NormCase{1, 7168, Source::kNone},
        NormCase{1, 7168, Source::kEmbed}, NormCase{1, 7168, Source::kDelta},
        NormCase{1, 7168, Source::kExperts, 9}, NormCase{3, 7168, Source::kExperts, 9},
        NormCase{17, 7168, Source::kDelta}, NormCase{64, 7168, Source::kDelta},
        NormCase{64, 7168, Source::kExperts, 9}, NormCase{100, 7168, Source::kExperts, 8},
        NormCase{300, 7168, Source::kNone}, NormCase{300, 7168, Source::kEmbed},
        NormCase{300, 7168, Source::kDelta}, NormCase{300, 7168, Source::kExperts, 9},
        NormCase{5, 7168, Source::kExperts, 11, /*gather=*/true},
        NormCase{300, 7168, Source::kDelta, 0, /*gather=*/true},
        NormCase{64, 7168, Source::kDelta, 0, false, /*power_of_two_scales=*/true},
        NormCase{300, 2048, Source::kExperts, 7, false, /*power_of_two_scales=*/true},
        NormCase{3, 2048, Source::kExperts, 1, true, true},
        NormCase{64, 2048, Source::kDelta, 0, false, false, /*fp8=*/true, /*bf16=*/false},
        NormCase{3, 7168, Source::kDelta, 0, false, false, /*fp8=*/false, /*bf16=*/true},
        // Rows that are no whole number of groups, and rows that need clusters of blocks.
        NormCase{3, 136, Source::kDelta, 0, false, false, /*fp8=*/false, /*bf16=*/true},
        NormCase{300, 1160, Source::kExperts, 5, false, false, /*fp8=*/false, /*bf16=*/true},
        NormCase{1, 16384, Source::kDelta}, NormCase{100, 16384, Source::kDelta},
        NormCase{400, 16384, Source::kDelta}),
    Name);

class NormTest : public DeviceTest {};

TEST_F(NormTest, RefusesBadArguments) {
  DeviceArray<float> weight(16512), residual(16512);
  DeviceArray<__nv_bfloat16> x(16512);
  DeviceArray<int32_t> tokens(1);
  LinearOutput out(1, 16512, true, true);
  AddNormArgs good;
  good.num_rows = 1;
  good.hidden_size = 256;
  good.weight = weight.get();
  good.residual = residual.get();
  good.delta = x.get();
  good.out = out.input();
  const auto refuses = [&](auto change) {
    AddNormArgs args = good;
    change(args);
    return AddNorm(args, nullptr) == cudaErrorInvalidValue;
  };
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.num_rows = -1; }));
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.hidden_size = 16512; }));
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.hidden_size = 136; }));  // with FP8
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.hidden_size = 0; }));
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.out = {}; }));
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.out.fp8.scale_stride = 0; }));
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.weight = nullptr; }));
  EXPECT_TRUE(refuses([](AddNormArgs& a) { a.residual = nullptr; }));
  EXPECT_TRUE(refuses([&](AddNormArgs& a) { a.expert_out = x.get(); }));   // two sources
  EXPECT_TRUE(refuses([&](AddNormArgs& a) { a.tokens = tokens.get(); }));  // without embed
  EXPECT_TRUE(refuses([&](AddNormArgs& a) {
    a.delta = nullptr;
    a.expert_out = x.get();  // without a routing
  }));
  EXPECT_FALSE(refuses([](AddNormArgs& a) { a.num_rows = 0; }));
}

class QuantizeRowsTest : public DeviceTest,
                         public testing::WithParamInterface<std::tuple<int, int, bool, int>> {};

TEST_P(QuantizeRowsTest, IsTheReferenceToTheBit) {
  const auto [num_rows, columns, power_of_two, num_real] = GetParam();
  const int64_t stride = columns + 24;
  std::vector<__nv_bfloat16> x = RandomBf16(num_rows * stride, 2, 1);
  // A group of zeros, one of values under the smallest scale, one with a huge value.
  for (int i = 0; i < kQuantGroup; ++i) {
    x[i] = __float2bfloat16(0);
    if (num_rows > 1) x[stride + i] = __float2bfloat16(1e-12f * (i % 3 - 1));
  }
  x[(num_rows - 1) * stride + columns - 1] = __float2bfloat16(-1e30f);
  const DeviceArray<__nv_bfloat16> x_device(x);
  const DeviceArray<int32_t> num_rows_device(std::vector<int32_t>{num_real});
  LinearOutput out(num_rows, columns, true, false);
  ASSERT_CUDA_OK(QuantizeRows(x_device.get(), stride, num_rows,
                              num_real >= 0 ? num_rows_device.get() : nullptr, columns,
                              power_of_two, out.input().fp8, nullptr));
  ASSERT_CUDA_OK(cudaDeviceSynchronize());
  const int end = num_real < 0 ? num_rows : std::min(num_rows, num_real);
  std::vector<double> row(columns);
  for (int i = 0; i < end; ++i) {
    for (int column = 0; column < columns; ++column)
      row[column] = __bfloat162float(x[i * stride + column]);
    out.ExpectRow(i, row, power_of_two, /*exact=*/true);
    if (HasFatalFailure()) return;
  }
  out.ExpectPoisonFrom(end);
}

INSTANTIATE_TEST_SUITE_P(
    Shapes, QuantizeRowsTest,
    testing::Values(std::tuple{1, 128, false, -1}, std::tuple{1, 2048, true, -1},
                    std::tuple{3, 7168, false, -1}, std::tuple{64, 2048, false, 17},
                    std::tuple{64, 2048, false, 0}, std::tuple{64, 2048, true, 1000},
                    std::tuple{300, 384, false, 299}, std::tuple{3000, 2048, false, 2500}));

}  // namespace
}  // namespace latentd
