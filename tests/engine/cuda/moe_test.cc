#include "engine/cuda/kernels/moe.h"

#include <cuda_bf16.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "engine/cpu/moe.h"
#include "engine/model/config.h"
#include "tests/engine/cuda/device_test.h"

namespace latentd {
namespace {

struct Shape {
  int experts, n_group, topk_group, k, hidden;
  bool norm = true;
};

struct Router {
  Shape shape;
  std::vector<float> gate, bias;  // the gate's values are bf16's unless f32
  bool f32 = false;
};

std::vector<float> RandomValues(uint32_t seed, size_t size, float sigma, bool bf16) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, sigma);
  std::vector<float> values(size);
  for (float& value : values)
    value = bf16 ? __bfloat162float(__float2bfloat16(normal(random))) : normal(random);
  return values;
}

std::vector<__nv_bfloat16> ToBf16(const std::vector<float>& values) {
  std::vector<__nv_bfloat16> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) result[i] = __float2bfloat16(values[i]);
  return result;
}

Router RandomRouter(uint32_t seed, const Shape& shape, bool f32) {
  return {.shape = shape,
          .gate = RandomValues(seed, size_t(shape.experts) * shape.hidden,
                               1.5f / std::sqrt(float(shape.hidden)), !f32),
          .bias = RandomValues(seed + 1, shape.experts, 0.05f, false),
          .f32 = f32};
}

struct Routed {
  std::vector<int32_t> row_of, topk_ids, token_of_row, group_offsets;
  std::vector<float> weights;
};

struct Local {
  int first_expert = 0, num_experts = 0, num_shared = 0;
};

Routed RouteOnGpu(const Router& router, const std::vector<float>& x, int num_real,
                  const Local& local) {
  const Shape& shape = router.shape;
  const int tokens = static_cast<int>(x.size() / shape.hidden),
            choices = shape.k + local.num_shared;
  DeviceArray<__nv_bfloat16> x_device(ToBf16(x)), gate_bf16(ToBf16(router.gate));
  DeviceArray<float> gate_f32(router.gate), bias(router.bias), weights(size_t(tokens) * choices);
  DeviceArray<int32_t> real(std::vector<int32_t>{num_real}), row_of(size_t(tokens) * choices),
      ids(size_t(tokens) * shape.k), token_of_row(size_t(tokens) * choices),
      offsets(local.num_experts + local.num_shared + 1);
  DeviceArray<std::byte> workspace(RouterWorkspaceBytes(tokens, shape.experts));
  workspace.Zero();
  const RouterArgs args = {.num_tokens = tokens,
                           .num_real_tokens = real.get(),
                           .hidden_size = shape.hidden,
                           .x = x_device.get(),
                           .gate_bf16 = router.f32 ? nullptr : gate_bf16.get(),
                           .gate_f32 = router.f32 ? gate_f32.get() : nullptr,
                           .correction_bias = bias.get(),
                           .n_routed_experts = shape.experts,
                           .n_group = shape.n_group,
                           .topk_group = shape.topk_group,
                           .num_experts_per_tok = shape.k,
                           .norm_topk_prob = shape.norm,
                           .routed_scaling_factor = 2.5f,
                           .first_expert = local.first_expert,
                           .num_local_experts = local.num_experts,
                           .num_shared = local.num_shared,
                           .workspace = workspace.get(),
                           .routing = {.num_choices = choices,
                                       .row_of = row_of.get(),
                                       .weights = weights.get(),
                                       .topk_ids = ids.get(),
                                       .token_of_row = token_of_row.get(),
                                       .group_offsets = offsets.get()}};
  EXPECT_EQ(RouteTokens(args, nullptr), cudaSuccess);
  EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess) << cudaGetErrorString(cudaGetLastError());
  return {row_of.Get(), ids.Get(), token_of_row.Get(), offsets.Get(), weights.Get()};
}

ModelConfig ConfigOf(const Shape& shape) {
  ModelConfig config;
  config.n_routed_experts = shape.experts;
  config.n_group = shape.n_group;
  config.topk_group = shape.topk_group;
  config.num_experts_per_tok = shape.k;
  config.norm_topk_prob = shape.norm;
  config.routed_scaling_factor = 2.5f;
  return config;
}

// How far a choice is from being decided: the least difference that would change it, of groups' and
// experts' scores.
double Margin(const Shape& shape, const std::vector<double>& choice) {
  const int per_group = shape.experts / shape.n_group;
  std::vector<std::pair<double, int>> groups;
  for (int g = 0; g < shape.n_group; ++g) {
    std::vector<double> in(choice.begin() + g * per_group, choice.begin() + (g + 1) * per_group);
    std::sort(in.rbegin(), in.rend());
    groups.push_back({in[0] + (per_group > 1 ? in[1] : 0.0), g});
  }
  std::sort(groups.rbegin(), groups.rend());
  double margin = INFINITY;
  if (shape.topk_group < shape.n_group)
    margin = groups[shape.topk_group - 1].first - groups[shape.topk_group].first;
  std::vector<double> allowed;
  for (int i = 0; i < shape.topk_group; ++i) {
    const int g = groups[i].second;
    allowed.insert(allowed.end(), choice.begin() + g * per_group,
                   choice.begin() + (g + 1) * per_group);
  }
  std::sort(allowed.rbegin(), allowed.rend());
  if (shape.k < static_cast<int>(allowed.size()))
    margin = std::min(margin, allowed[shape.k - 1] - allowed[shape.k]);
  return margin;
}

double Dot(const float* a, const float* b, int n) {  // n is a multiple of 8
  double sums[8] = {};
  for (int i = 0; i < n; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += double{a[i + j]} * b[i + j];
  }
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

// The choices are the CPU engine's for logits in f64, but where scores tie; then everything that
// follows from them.
void Check(const Router& router, const std::vector<float>& x, int num_real, const Local& local,
           const Routed& routed) {
  const Shape& shape = router.shape;
  const int tokens = static_cast<int>(x.size() / shape.hidden),
            choices = shape.k + local.num_shared, k = shape.k;
  const ModelConfig config = ConfigOf(shape);
  int ties = 0;
  for (int t = 0; t < std::min(num_real, tokens); ++t) {
    std::vector<double> scores(shape.experts), choice(shape.experts);
    std::vector<float> scores_f32(shape.experts);
    for (int e = 0; e < shape.experts; ++e) {
      const double logit =
          Dot(&x[size_t(t) * shape.hidden], &router.gate[size_t(e) * shape.hidden], shape.hidden);
      scores[e] = 1.0 / (1.0 + std::exp(-logit));
      scores_f32[e] = static_cast<float>(scores[e]);
      choice[e] = scores[e] + router.bias[e];
    }
    std::vector<int32_t> expected(k),
        chosen(routed.topk_ids.begin() + t * k, routed.topk_ids.begin() + (t + 1) * k);
    std::vector<float> unused(k);
    RouteToken(config, scores_f32.data(), router.bias.data(), expected.data(), unused.data());
    double sum = 0;
    for (int j = 0; j < k; ++j) {
      ASSERT_GE(chosen[j], 0) << "token " << t;
      ASSERT_LT(chosen[j], shape.experts) << "token " << t;
      sum += scores[chosen[j]];
      if (j > 0) {
        EXPECT_GE(choice[chosen[j - 1]], choice[chosen[j]] - 1e-6) << "best first";
      }
    }
    for (int j = 0; j < k; ++j) {
      const double weight = scores[chosen[j]] / (shape.norm ? sum : 1.0) * 2.5;
      ASSERT_NEAR(routed.weights[t * choices + j], weight, 2e-6 * 2.5)
          << "token " << t << " choice " << j;
    }
    for (int j = k; j < choices; ++j) ASSERT_EQ(routed.weights[t * choices + j], 1.0f);
    std::sort(chosen.begin(), chosen.end());
    if (chosen != expected) {
      ++ties;
      ASSERT_LT(Margin(shape, choice), 1e-6) << "token " << t << " chose otherwise";
    }
  }
  EXPECT_LE(ties, 1 + tokens / 1000);

  // Rows by group, in a group by token.
  const int groups = local.num_experts + local.num_shared;
  std::vector<int32_t> row_of(size_t(tokens) * choices, -1), token_of_row, offsets = {0};
  for (int g = 0; g < groups; ++g) {
    for (int t = 0; t < std::min(num_real, tokens); ++t) {
      for (int j = 0; j < choices; ++j) {
        const int group =
            j < k ? routed.topk_ids[t * k + j] - local.first_expert : local.num_experts + j - k;
        if (group != g || (j < k && group >= local.num_experts)) continue;
        row_of[t * choices + j] = static_cast<int32_t>(token_of_row.size());
        token_of_row.push_back(t);
      }
    }
    offsets.push_back(static_cast<int32_t>(token_of_row.size()));
  }
  EXPECT_EQ(routed.row_of, row_of);
  EXPECT_EQ(routed.group_offsets, offsets);
  for (size_t i = 0; i < routed.token_of_row.size(); ++i) {
    ASSERT_EQ(routed.token_of_row[i], i < token_of_row.size() ? token_of_row[i] : -1)
        << "row " << i;
  }
  for (int t = num_real; t < tokens; ++t) {
    for (int j = 0; j < choices; ++j) ASSERT_EQ(routed.weights[t * choices + j], 0.0f) << "padding";
    for (int j = 0; j < k; ++j) ASSERT_EQ(routed.topk_ids[t * k + j], -1) << "padding";
  }
}

class RouterTest : public DeviceTest {};

TEST_F(RouterTest, IsTheCpus) {
  const Shape shapes[] = {
      {256, 8, 4, 8, 7168}, {16, 4, 2, 4, 256}, {16, 1, 1, 8, 7168},         {64, 1, 1, 6, 2048},
      {384, 1, 1, 8, 7168}, {2, 1, 1, 1, 32},   {160, 8, 3, 6, 5120, false}, {60, 5, 2, 4, 96},
      {33, 11, 7, 10, 352}, {8, 1, 1, 8, 128}};
  uint32_t seed = 1;
  for (const Shape& shape : shapes) {
    for (bool f32 : {false, true}) {
      const Router router = RandomRouter(seed += 10, shape, f32);
      for (int tokens : {1, 2, 5, 8, 9, 17, 33, 64, 65, 100, 256, 257}) {
        if (shape.hidden > 4000 && (tokens == 2 || tokens == 17 || tokens == 100))
          continue;  // time
        if (shape.hidden > 4000 && f32 && tokens > 65) continue;
        SCOPED_TRACE(testing::Message() << shape.experts << " experts, hidden " << shape.hidden
                                        << ", f32 " << f32 << ", tokens " << tokens);
        const std::vector<float> x =
            RandomValues(++seed, size_t(tokens) * shape.hidden, 1.0f, true);
        const int real = tokens % 2 == 0 ? tokens : tokens - tokens / 3;
        const int local_experts = tokens % 3 == 0 ? shape.experts : std::max(1, shape.experts / 4);
        const Local local = {.first_expert = tokens % 5 == 0 ? shape.experts - local_experts : 0,
                             .num_experts = local_experts,
                             .num_shared = tokens % 4};
        Check(router, x, real, local, RouteOnGpu(router, x, real, local));
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST_F(RouterTest, NoTokensAndOnlyPadding) {
  const Router router = RandomRouter(3, {16, 4, 2, 4, 256}, false);
  const Local local = {.num_experts = 16, .num_shared = 1};
  const Routed none = RouteOnGpu(router, {}, 0, local);
  EXPECT_EQ(none.group_offsets, std::vector<int32_t>(18, 0));
  const std::vector<float> x = RandomValues(4, 40 * 256, 1.0f, true);
  Check(router, x, 0, local, RouteOnGpu(router, x, 0, local));
}

// One order of summation: neither the number of tokens nor the kernel that it takes shows in the
// bits.
TEST_F(RouterTest, ATokensWeightsDoNotDependOnTheOthers) {
  for (const Shape& shape :
       {Shape{256, 8, 4, 8, 7168}, Shape{16, 1, 1, 8, 7168}, Shape{64, 1, 1, 6, 224}}) {
    for (bool f32 : {false, true}) {
      const Router router = RandomRouter(5, shape, f32);
      const Local local = {.num_experts = shape.experts};
      constexpr int kTokens = 2100;  // more than slices are apart for
      const std::vector<float> x = RandomValues(6, size_t(kTokens) * shape.hidden, 1.0f, true);
      const Routed all = RouteOnGpu(router, x, kTokens, local);
      for (int tokens : {1, 3, 16, 30, 64, 200, 700}) {
        const int first = 1000 - tokens;
        const std::vector<float> part(x.begin() + int64_t{first} * shape.hidden,
                                      x.begin() + int64_t{first + tokens} * shape.hidden);
        const Routed routed = RouteOnGpu(router, part, tokens, local);
        const size_t from = size_t(first) * shape.k;
        EXPECT_TRUE(
            std::equal(routed.topk_ids.begin(), routed.topk_ids.end(), all.topk_ids.begin() + from))
            << tokens;
        EXPECT_EQ(std::memcmp(routed.weights.data(), all.weights.data() + from,
                              routed.weights.size() * 4),
                  0)
            << tokens << " tokens of " << shape.experts << " experts, f32 " << f32;
      }
    }
  }
}

TEST_F(RouterTest, ManyTokens) {
  for (const Shape& shape : {Shape{256, 8, 4, 8, 512}, Shape{16, 1, 1, 8, 256}}) {
    for (int tokens : {1024, 1025, 2048, 2049, 8192}) {
      const Router router = RandomRouter(8, shape, false);
      const std::vector<float> x = RandomValues(9, size_t(tokens) * shape.hidden, 1.0f, true);
      const Local local = {.num_experts = shape.experts == 16 ? 16 : 32, .num_shared = 1};
      Check(router, x, tokens - 5, local, RouteOnGpu(router, x, tokens - 5, local));
    }
  }
}

TEST_F(RouterTest, EqualScoresGoToTheLowestIndex) {
  for (const Shape& shape :
       {Shape{16, 4, 2, 4, 256}, Shape{256, 8, 4, 8, 256}, Shape{384, 1, 1, 8, 256}}) {
    Router router = RandomRouter(10, shape, false);
    for (int e = 1; e < shape.experts; ++e) {
      std::copy_n(router.gate.begin(), shape.hidden,
                  router.gate.begin() + int64_t{e} * shape.hidden);
    }
    router.bias.assign(shape.experts, -2.0f);  // groups outside are -inf, not 0
    const Routed routed = RouteOnGpu(router, RandomValues(11, 20 * shape.hidden, 1.0f, true), 20,
                                     {.num_experts = shape.experts});
    for (int t = 0; t < 20; ++t) {
      for (int j = 0; j < shape.k; ++j) EXPECT_EQ(routed.topk_ids[t * shape.k + j], j);
    }
  }
}

TEST_F(RouterTest, NumbersThatAreNoneStillChooseExperts) {
  const Shape shape = {256, 8, 4, 8, 256};
  const Router router = RandomRouter(12, shape, false);
  const std::vector<float> x(3 * 256, NAN);
  const Routed routed = RouteOnGpu(router, x, 3, {.num_experts = 256, .num_shared = 1});
  for (int t = 0; t < 3; ++t) {
    std::vector<int32_t> ids(routed.topk_ids.begin() + t * 8,
                             routed.topk_ids.begin() + (t + 1) * 8);
    std::sort(ids.begin(), ids.end());
    EXPECT_GE(ids.front(), 0);
    EXPECT_LT(ids.back(), 256);
    EXPECT_EQ(std::unique(ids.begin(), ids.end()), ids.end());
  }
  EXPECT_EQ(routed.group_offsets.back(), 27);
}

TEST_F(RouterTest, BadArgumentsAreRefused) {
  EXPECT_EQ(RouteTokens({}, nullptr), cudaErrorInvalidValue);
}

// --- GatherRows ---

TEST_F(RouterTest, GatherMovesRowsAndTheirScales) {
  constexpr int kHidden = 7168, kScaleGroups = kHidden / kQuantGroup;
  for (int tokens : {1, 3, 64, 300}) {
    const int rows = 5 * tokens - 2, max_rows = 6 * tokens;
    std::mt19937 random(tokens);
    std::vector<uint8_t> data(size_t(tokens) * kHidden);
    for (uint8_t& byte : data) byte = static_cast<uint8_t>(random());
    const int64_t stride = (tokens + 3) / 4 * 4, out_stride = (max_rows + 3) / 4 * 4;
    const std::vector<float> scales = RandomValues(1, kScaleGroups * stride, 1.0f, false);
    const std::vector<__nv_bfloat16> bf16 =
        ToBf16(RandomValues(2, size_t(tokens) * kHidden, 1.0f, true));
    std::vector<int32_t> token_of_row(max_rows, 1 << 30);
    for (int i = 0; i < rows; ++i) token_of_row[i] = static_cast<int32_t>(random() % tokens);

    DeviceArray<uint8_t> x(data), out(size_t(max_rows) * kHidden);
    DeviceArray<float> x_scales(scales), out_scales(kScaleGroups * out_stride);
    DeviceArray<__nv_bfloat16> x_bf16(bf16), out_bf16(size_t(max_rows) * kHidden);
    DeviceArray<int32_t> map(token_of_row),
        offsets(std::vector<int32_t>{0, rows / 2, rows / 2, rows});
    GatherArgs args = {
        .routing = {.token_of_row = map.get(), .group_offsets = offsets.get()},
        .num_groups = 3,
        .max_rows = max_rows,
        .hidden_size = kHidden,
        .x = {.fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(x.get()), x_scales.get(), stride}},
        .out = {
            .fp8 = {reinterpret_cast<__nv_fp8_e4m3*>(out.get()), out_scales.get(), out_stride}}};
    ASSERT_CUDA_OK(GatherRows(args, nullptr));
    args.x = {.fp8 = {}, .bf16 = x_bf16.get()};
    args.out = {.fp8 = {}, .bf16 = out_bf16.get()};
    ASSERT_CUDA_OK(GatherRows(args, nullptr));
    ASSERT_CUDA_OK(cudaDeviceSynchronize());
    const auto got = out.Get();
    const auto got_scales = out_scales.Get();
    const auto got_bf16 = out_bf16.Get();
    for (int row = 0; row < max_rows; ++row) {
      if (row >= rows) {
        EXPECT_EQ(got[size_t(row) * kHidden], 0xff) << "row " << row << " must not be written";
        EXPECT_TRUE(std::isnan(got_scales[row])) << row;
        EXPECT_TRUE(std::isnan(__bfloat162float(got_bf16[size_t(row) * kHidden]))) << row;
        continue;
      }
      const size_t token = token_of_row[row];
      ASSERT_EQ(std::memcmp(&got[size_t(row) * kHidden], &data[token * kHidden], kHidden), 0)
          << row;
      ASSERT_EQ(std::memcmp(&got_bf16[size_t(row) * kHidden], &bf16[token * kHidden], 2 * kHidden),
                0)
          << row;
      for (int g = 0; g < kScaleGroups; ++g) {
        ASSERT_EQ(got_scales[g * out_stride + row], scales[g * stride + token]) << row << " " << g;
      }
    }
  }
  EXPECT_EQ(GatherRows({}, nullptr), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace latentd
