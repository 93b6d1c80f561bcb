// What must change nothing, bit for bit: batch, chunk size, shared blocks, preemption, threads. And
// absorbed MLA against naive MLA. The cache starts as NaN, so that a wrong row cannot go unnoticed.

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "tests/engine/cpu/harness.h"
#include "tests/engine/cpu/naive_model.h"

namespace latentd {
namespace {

class InvarianceTest : public ::testing::TestWithParam<const Kernels*> {
 protected:
  static const LoadedModel& Model() {
    static const LoadedModel* model = new LoadedModel(LoadModel(kDemoModel));
    return *model;
  }
  RunnerOptions Options(int num_threads = 2) const {
    return {.kernels = GetParam(), .num_threads = num_threads, .num_blocks = 64};
  }
};

TEST_P(InvarianceTest, ChunkSize) {
  // Beyond two segments of attention (256 keys) and one tile of tokens (512).
  const std::vector<TokenId> tokens = SomeTokens(601, 4096, 1);
  Runner runner(Model(), Options());
  const std::vector<float> whole = runner.Prefill(tokens, 2048, 40);
  for (float logit : whole) ASSERT_TRUE(std::isfinite(logit));
  for (int chunk : {1, 7, 64, 100, 513}) {
    Runner other(Model(), Options());
    EXPECT_TRUE(SameBits(other.Prefill(tokens, chunk, 40), whole)) << "chunk " << chunk;
  }
}

TEST_P(InvarianceTest, Threads) {
  const std::vector<TokenId> tokens = SomeTokens(300, 4096, 2);
  const std::vector<float> one = Runner(Model(), Options(1)).Prefill(tokens, 299, 30);
  for (int threads : {2, 3, 8}) {
    EXPECT_TRUE(SameBits(Runner(Model(), Options(threads)).Prefill(tokens, 299, 30), one))
        << threads;
  }
}

TEST_P(InvarianceTest, BatchAndBlocks) {
  // Sequences of every age in one step, in scattered blocks, against each alone.
  Runner alone(Model(), Options()), together(Model(), Options());
  const std::vector<int> computed = {0, 3, 63, 64, 65, 200, 290, 0, 10, 128, 1, 5};
  const std::vector<int> now = {5, 1, 1, 1, 70, 1, 3, 130, 1, 1, 1, 2};
  std::vector<Runner::Part> parts;
  std::vector<float> expected;
  BlockId next = 63;
  for (size_t i = 0; i < computed.size(); ++i) {
    const int length = computed[i] + now[i];
    const std::vector<TokenId> tokens = SomeTokens(length, 4096, 10 + static_cast<uint32_t>(i));
    const std::vector<float> logits = alone.Prefill(tokens, 2048, now[i]);
    expected.insert(expected.end(), logits.begin(), logits.end());
    Runner::Part part{.tokens = {tokens.begin() + computed[i], tokens.end()},
                      .num_computed = computed[i],
                      .blocks = {}};
    for (int b = 0; b < (length + kBlockSize - 1) / kBlockSize; ++b) part.blocks.push_back(next--);
    if (computed[i] > 0) {
      together.Step({{.tokens = {tokens.begin(), tokens.begin() + computed[i]},
                      .num_computed = 0,
                      .blocks = part.blocks}});
    }
    parts.push_back(part);
  }
  EXPECT_TRUE(SameBits(together.Step(parts), expected));
}

TEST_P(InvarianceTest, PrefixHitAndRecomputation) {
  const std::vector<TokenId> prefix = SomeTokens(128, 4096, 3);
  std::vector<TokenId> a = prefix, b = prefix;
  for (TokenId t : SomeTokens(50, 4096, 4)) a.push_back(t);
  for (TokenId t : SomeTokens(70, 4096, 5)) b.push_back(t);
  const std::vector<float> expected_b = Runner(Model(), Options()).Prefill(b, 2048, 70);

  // b takes the two blocks that a has filled, in one step with a's next token.
  Runner runner(Model(), Options());
  runner.Prefill(a, 2048, 1);
  const std::vector<float> logits = runner.Step(
      {{.tokens = {9}, .num_computed = 178, .blocks = {0, 1, 2}},
       {.tokens = {b.begin() + 128, b.end()}, .num_computed = 128, .blocks = {0, 1, 7, 8}}});
  EXPECT_TRUE(SameBits({logits.begin() + 4096, logits.end()}, expected_b));

  // Preempted, its blocks taken by another, then computed again in other blocks and chunks.
  runner.Prefill(SomeTokens(200, 4096, 6), 2048, 1, 5);
  EXPECT_TRUE(SameBits(runner.Prefill(b, 33, 70, 20), expected_b));
}

INSTANTIATE_TEST_SUITE_P(, InvarianceTest, ::testing::ValuesIn(SupportedKernels()),
                         [](const auto& info) { return std::string(info.param->name); });

// Every tiny checkpoint, and so every shape and dtype, under the same rule.
TEST(VariantInvarianceTest, ChunksChangeNothing) {
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/variants")) {
    if (!entry.is_directory()) continue;
    SCOPED_TRACE(entry.path().string());
    const LoadedModel model = LoadModel(entry.path());
    const std::vector<TokenId> tokens = SomeTokens(90, model.config.vocab_size, 8);
    for (const Kernels* kernels : SupportedKernels()) {
      const RunnerOptions options{.kernels = kernels, .num_blocks = 4, .max_positions = 128};
      const std::vector<float> whole = Runner(model, options).Prefill(tokens, 90);
      for (int chunk : {1, 13, 64}) {
        EXPECT_TRUE(SameBits(Runner(model, options).Prefill(tokens, chunk), whole))
            << kernels->name;
      }
    }
  }
}

// Rounded activations too are a matter of their own row.
TEST(QuantizedInvarianceTest, ChunksAndBatchChangeNothing) {
  const LoadedModel model = LoadModel(kDemoModel);
  const std::vector<TokenId> a = SomeTokens(90, 4096, 11), b = SomeTokens(70, 4096, 12);
  for (const Kernels* kernels : SupportedKernels()) {
    const RunnerOptions options{
        .kernels = kernels, .num_blocks = 8, .max_positions = 128, .quantize_activations = true};
    const std::vector<float> whole = Runner(model, options).Prefill(a, 90);
    for (int chunk : {1, 13, 64}) {
      EXPECT_TRUE(SameBits(Runner(model, options).Prefill(a, chunk), whole)) << kernels->name;
    }
    Runner together(model, options);
    const std::vector<float> both =
        together.Step({{.tokens = b, .num_computed = 0, .blocks = {4, 2}},
                       {.tokens = a, .num_computed = 0, .blocks = {7, 0}}});
    EXPECT_TRUE(SameBits({both.begin() + 70 * 4096, both.end()}, whole)) << kernels->name;
  }
}

// Absorbed and naive MLA are one another's oracle.
TEST(AbsorbedMlaTest, IsNaiveMla) {
  for (const char* name :
       {"base", "demo_head_dims", "fp8_blocks", "q_lora_rank_null", "sizes", "yarn",
        "attention_bias", "rope_interleave_false", "n_shared_experts_0"}) {
    SCOPED_TRACE(name);
    const LoadedModel model = LoadModel(std::filesystem::path("tests/golden/variants") / name);
    const std::vector<TokenId> tokens = SomeTokens(70, model.config.vocab_size, 9);
    const std::vector<float> naive = NaiveLogits(model.config, model.weights, tokens);
    float largest = 0.0f;
    for (float logit : naive) largest = std::max(largest, std::abs(logit));
    for (const Kernels* kernels : SupportedKernels()) {
      const std::vector<float> absorbed =
          Runner(model, {.kernels = kernels, .num_blocks = 4, .max_positions = 128})
              .Prefill(tokens, 70);
      ASSERT_EQ(absorbed.size(), naive.size());
      for (size_t i = 0; i < naive.size(); ++i) {
        ASSERT_NEAR(absorbed[i], naive[i], 1e-4 * largest) << kernels->name << " at " << i;
      }
    }
  }
}

}  // namespace
}  // namespace latentd
