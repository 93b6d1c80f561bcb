#include "engine/cpu/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <ostream>
#include <string>
#include <vector>

#include "engine/sampling.h"

namespace latentd {
namespace {

// Random123's known answers (kat_vectors, philox4x32 10).
TEST(PhiloxTest, KnownAnswers) {
  using Words = std::array<uint32_t, 4>;
  EXPECT_EQ(Philox4x32({0, 0, 0, 0}, {0, 0}),
            (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(Philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}),
            (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
  EXPECT_EQ(Philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
            (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(UniformDrawTest, EveryPartOfTheKeyMatters) {
  const double draw = UniformDraw(1, 2, 3);
  EXPECT_EQ(draw, UniformDraw(1, 2, 3));
  EXPECT_NE(draw, UniformDraw(1 + (uint64_t{1} << 32), 2, 3));
  EXPECT_NE(draw, UniformDraw(2, 2, 3));
  EXPECT_NE(draw, UniformDraw(1, 3, 3));
  EXPECT_NE(draw, UniformDraw(1, 2, 4));
  for (int i = 0; i < 100000; ++i) {
    const double u = UniformDraw(7, 0, i);
    ASSERT_GE(u, 0.0);
    ASSERT_LT(u, 1.0);
  }
}

std::vector<float> SomeLogits() {
  // Close enough that every token is drawn, with a tie in the middle.
  return {1.0f, -0.5f, 2.0f, 0.25f, 2.0f, -1.0f, 0.25f, 1.5f, -2.0f, 0.75f, 0.0f, 1.25f};
}

// The definition, written the slow way: sorts everything.
std::vector<double> ExactDistribution(std::vector<float> logits,
                                      const std::vector<TokenId>& suppressed,
                                      const SamplingParams& params) {
  for (TokenId id : suppressed) logits[id] = -INFINITY;
  std::vector<int> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  std::vector<double> weights(logits.size());
  for (size_t i = 0; i < logits.size(); ++i) {
    weights[i] = std::exp((double{logits[i]} - logits[order[0]]) / params.temperature);
  }
  size_t kept = params.top_k > 0 ? std::min<size_t>(params.top_k, order.size()) : order.size();
  double total = 0.0, running = 0.0;
  for (size_t i = 0; i < kept; ++i) total += weights[order[i]];
  for (size_t i = 0; i < kept; ++i) {
    running += weights[order[i]];
    if (running >= params.top_p * total) kept = i + 1;
  }
  std::vector<double> result(logits.size(), 0.0);
  double sum = 0.0;
  for (size_t i = 0; i < kept; ++i) {
    if (weights[order[i]] < params.min_p) continue;
    result[order[i]] = weights[order[i]];
    sum += weights[order[i]];
  }
  for (double& p : result) p /= sum;
  return result;
}

struct Case {
  std::string name;
  SamplingParams params;
  std::vector<TokenId> suppressed;
};

void PrintTo(const Case& c, std::ostream* out) { *out << c.name; }

class ChiSquareTest : public ::testing::TestWithParam<Case> {};

TEST_P(ChiSquareTest, DrawsFollowTheExactDistribution) {
  constexpr int kDraws = 200000;
  SamplingParams params = GetParam().params;
  params.seed = 20240607;
  const std::vector<double> exact = ExactDistribution(SomeLogits(), GetParam().suppressed, params);
  std::vector<int> counts(exact.size());
  Sampler sampler;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> logits = SomeLogits();
    auto token = sampler.Sample(absl::MakeSpan(logits), GetParam().suppressed, params, i);
    ASSERT_TRUE(token.ok());
    ++counts[*token];
  }
  double chi_square = 0.0;
  int degrees = -1;
  for (size_t i = 0; i < exact.size(); ++i) {
    if (exact[i] == 0.0) {
      EXPECT_EQ(counts[i], 0) << "token " << i << " must never be drawn";
      continue;
    }
    ++degrees;
    const double expected = exact[i] * kDraws;
    chi_square += (counts[i] - expected) * (counts[i] - expected) / expected;
  }
  // Wilson-Hilferty: 3.7 standard deviations, one false alarm in 10^4 if the seed were not fixed.
  if (degrees > 0) {
    const double z = 2.0 / (9.0 * degrees);
    EXPECT_LT(chi_square, degrees * std::pow(1.0 - z + 3.7 * std::sqrt(z), 3.0));
  }
}

INSTANTIATE_TEST_SUITE_P(
    , ChiSquareTest,
    ::testing::Values(
        Case{"plain", {}, {}}, Case{"cold", {.temperature = 0.6f}, {}},
        Case{"hot", {.temperature = 2.0f}, {}}, Case{"top_k_1", {.top_k = 1}, {}},
        Case{"top_k_splits_a_tie", {.top_k = 8}, {}},
        Case{"top_k_beyond_the_vocabulary", {.top_k = 100}, {}}, Case{"top_p", {.top_p = 0.7f}, {}},
        Case{"top_p_tiny", {.top_p = 1e-6f}, {}}, Case{"min_p", {.min_p = 0.3f}, {}},
        Case{"min_p_1", {.min_p = 1.0f}, {}},
        Case{"all", {.temperature = 1.3f, .top_p = 0.9f, .top_k = 9, .min_p = 0.2f}, {}},
        Case{"suppressed", {.top_k = 5}, {2, 7, 7}}),
    [](const auto& info) { return info.param.name; });

// Every cut at a time, on a vocabulary that needs several rounds of partial sorting.
TEST(SamplerTest, LargeVocabularyIsTheDefinition) {
  std::vector<float> logits(20000);
  for (size_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<float>(8.0 * UniformDraw(3, 0, static_cast<int64_t>(i)));
  }
  Sampler sampler;
  for (int i = 0; i < 300; ++i) {
    SamplingParams params;
    params.temperature = 0.3f + 0.01f * static_cast<float>(i % 100);
    params.top_p = i % 3 == 0 ? 1.0f : 0.05f + 0.0031f * static_cast<float>(i);
    params.top_k = i % 4 == 0 ? 0 : 1 + i * 50;
    params.min_p = i % 5 == 0 ? 0.2f : 0.0f;
    params.seed = i;
    const std::vector<double> exact = ExactDistribution(logits, {}, params);
    const double target = UniformDraw(params.seed, 0, 11);
    double running = 0.0;
    size_t expected = 0;
    while (expected + 1 < exact.size() && (running += exact[expected]) <= target) ++expected;
    std::vector<float> copy = logits;
    auto token = sampler.Sample(absl::MakeSpan(copy), {}, params, 11);
    ASSERT_TRUE(token.ok());
    EXPECT_EQ(*token, static_cast<TokenId>(expected)) << i;
  }
}

TEST(SamplerTest, GreedyTakesTheLowestOfEqualIds) {
  Sampler sampler;
  std::vector<float> logits = SomeLogits();
  EXPECT_EQ(*sampler.Sample(absl::MakeSpan(logits), {}, {.temperature = 0.0f}, 0), 2);
  logits = SomeLogits();
  EXPECT_EQ(*sampler.Sample(absl::MakeSpan(logits), {2}, {.temperature = 0.0f}, 0), 4);
}

TEST(SamplerTest, AnAlmostZeroTemperatureIsGreedyAmongUniqueLogits) {
  Sampler sampler;
  for (int i = 0; i < 1000; ++i) {
    std::vector<float> logits = {0.0f, 1.0f, 3.0f, 2.0f};
    EXPECT_EQ(*sampler.Sample(absl::MakeSpan(logits), {}, {.temperature = 1e-30f, .seed = 5}, i),
              2);
  }
}

TEST(SamplerTest, LogitsThatAreNoNumbersAreAnError) {
  Sampler sampler;
  for (float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY}) {
    std::vector<float> logits = SomeLogits();
    logits[3] = bad;
    auto token = sampler.Sample(absl::MakeSpan(logits), {}, {}, 0);
    EXPECT_EQ(token.status().code(), absl::StatusCode::kInternal);
    EXPECT_NE(token.status().message().find("token 3"), std::string::npos);
  }
}

TEST(SamplerTest, AllSuppressedIsAnError) {
  Sampler sampler;
  std::vector<float> logits = {1.0f, 2.0f};
  EXPECT_EQ(sampler.Sample(absl::MakeSpan(logits), {0, 1}, {}, 0).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace latentd
