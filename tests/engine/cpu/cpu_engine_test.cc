#include "engine/cpu/cpu_engine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "engine/model/quantization.h"
#include "tests/engine/cpu/harness.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

const LoadedModel& Tiny() {
  static const LoadedModel* model = new LoadedModel(LoadModel("tests/golden/variants/base"));
  return *model;
}

std::unique_ptr<CpuEngine> MakeEngine(int num_threads = 2) {
  auto engine = CpuEngine::Create(Tiny().config, Tiny().weights,
                                  {.num_threads = num_threads,
                                   .num_blocks = 8,
                                   .max_step_tokens = 100,
                                   .max_sequences = 6,
                                   .max_model_len = 120});
  EXPECT_TRUE(engine.ok()) << engine.status();
  return *std::move(engine);
}

// Two sequences: 70 tokens from nothing in blocks 3, 1, and 2 tokens in block 5.
StepPlan GoodPlan() {
  StepPlan plan;
  plan.sequences.resize(2);
  SequenceStep& a = plan.sequences[0];
  a.id = 11;
  a.num_tokens = 70;
  a.num_blocks = 2;
  a.sample = true;
  SequenceStep& b = plan.sequences[1];
  b.id = 12;
  b.num_tokens = 2;
  b.num_blocks = 1;
  b.num_suppressed = 1;
  b.sample = true;
  for (int i = 0; i < 72; ++i) plan.tokens.push_back(i % 50);
  plan.blocks = {3, 1, 5};
  plan.suppressed = {7};
  return plan;
}

TEST(CpuEngineTest, RunsAPlan) {
  auto engine = MakeEngine();
  auto result = engine->Execute(GoodPlan());
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->sampled.size(), 2u);
  result = engine->Execute({});
  ASSERT_TRUE(result.ok());
  EXPECT_TRUE(result->sampled.empty());
}

TEST(CpuEngineTest, RefusesWrongPlansByName) {
  struct Wrong {
    void (*change)(StepPlan&);
    const char* message;
  };
  const Wrong cases[] = {
      {[](StepPlan& p) { p.tokens[3] = -1; }, "token -1"},
      {[](StepPlan& p) { p.tokens[71] = 1 << 30; }, "token 1073741824"},
      {[](StepPlan& p) { p.tokens.pop_back(); }, "tokens has 71"},
      {[](StepPlan& p) { p.blocks[0] = 8; }, "block 8"},
      {[](StepPlan& p) { p.blocks[1] = -5; }, "block -5"},
      {[](StepPlan& p) { p.blocks.push_back(0); }, "blocks has 4"},
      {[](StepPlan& p) { p.blocks[2] = 3; }, "both write block 3"},
      {[](StepPlan& p) { p.blocks[1] = 3; }, "both write block 3"},
      {[](StepPlan& p) { p.suppressed[0] = 1 << 20; }, "suppressed token"},
      {[](StepPlan& p) { p.suppressed.clear(); }, "suppressed has 0"},
      {[](StepPlan& p) { p.sequences[0].dp_rank = 1; }, "dp_rank 1"},
      {[](StepPlan& p) { p.sequences[1].num_tokens = 0; }, "num_tokens 0"},
      {[](StepPlan& p) { p.sequences[1].num_tokens = -2; }, "num_tokens -2"},
      {[](StepPlan& p) { p.sequences[1].num_computed_tokens = -1; }, "num_computed_tokens -1"},
      {[](StepPlan& p) {
         p.sequences[1].num_computed_tokens = std::numeric_limits<int32_t>::max();
       },
       "the limit is 120"},
      {[](StepPlan& p) { p.sequences[0].num_blocks = 1; }, "num_blocks 1 for 70"},
      {[](StepPlan& p) { p.sequences[1].num_suppressed = -1; }, "num_suppressed -1"},
      {[](StepPlan& p) { p.sequences[0].sampling.temperature = NAN; }, "temperature nan"},
      {[](StepPlan& p) { p.sequences[0].sampling.top_p = 0.0f; }, "top_p 0"},
      {[](StepPlan& p) { p.sequences[0].sampling.top_k = -1; }, "top_k -1"},
      {[](StepPlan& p) { p.sequences[0].sampling.min_p = 1.5f; }, "min_p 1.5"},
      {[](StepPlan& p) { p.sequences.resize(7); }, "7 sequences"},
      {[](StepPlan& p) { p.tokens.resize(101); }, "101 tokens"},
  };
  auto engine = MakeEngine();
  for (const Wrong& wrong : cases) {
    StepPlan plan = GoodPlan();
    wrong.change(plan);
    auto result = engine->Execute(plan);
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInvalidArgument) << wrong.message;
    EXPECT_THAT(std::string(result.status().message()), HasSubstr(wrong.message));
  }
  EXPECT_TRUE(engine->Execute(GoodPlan()).ok()) << "a refused plan leaves nothing behind";
}

TEST(CpuEngineTest, RefusesAReadOfABlockThatIsWritten) {
  StepPlan plan = GoodPlan();
  plan.sequences[1].num_computed_tokens = 64;
  plan.sequences[1].num_blocks = 2;
  plan.blocks = {3, 1, 3, 5};
  auto result = MakeEngine()->Execute(plan);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("reads block 3"));
}

TEST(CpuEngineTest, NamesTheSequenceThatCannotBeSampled) {
  StepPlan plan = GoodPlan();
  plan.sequences[1].num_suppressed = Tiny().config.vocab_size;
  plan.suppressed.clear();
  for (int i = 0; i < Tiny().config.vocab_size; ++i) plan.suppressed.push_back(i);
  auto result = MakeEngine()->Execute(plan);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("sequence 12"));
}

TEST(CpuEngineTest, RefusesWrongOptionsByName) {
  struct Wrong {
    CpuEngineOptions options;
    const char* message;
  };
  for (const Wrong& wrong : {Wrong{{.num_blocks = 0}, "num_blocks: 0"},
                             Wrong{{.num_threads = -1, .num_blocks = 1}, "num_threads: -1"},
                             Wrong{{.num_blocks = 1, .max_step_tokens = 0}, "max_step_tokens: 0"},
                             Wrong{{.num_blocks = 1, .max_sequences = 0}, "max_sequences: 0"},
                             Wrong{{.num_blocks = 1, .max_model_len = 1 << 30}, "max_model_len"}}) {
    auto engine = CpuEngine::Create(Tiny().config, Tiny().weights, wrong.options);
    EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(engine.status().message()), HasSubstr(wrong.message));
  }
}

TEST(CpuEngineTest, RefusesACacheThatDoesNotFit) {
  auto engine = CpuEngine::Create(Tiny().config, Tiny().weights,
                                  {.num_blocks = std::numeric_limits<int32_t>::max()});
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(engine.status().message()), HasSubstr("2147483647 blocks"));
}

// A checkpoint may have some projections in FP8 and others not; gate and up share a matrix here.
TEST(CpuEngineTest, GateAndUpMayDifferInType) {
  LoadedModel model = LoadModel("tests/golden/variants/fp8");
  const std::vector<TokenId> tokens = {1, 2, 3, 4, 5};
  const std::vector<float> expected = Runner(model, {.num_blocks = 1}).Prefill(tokens, 5);
  std::vector<std::vector<float>> copies;
  for (LayerWeights& layer : model.weights.layers) {
    for (LinearWeight* linear : {&layer.mlp.up_proj, &layer.moe.shared_experts.gate_proj}) {
      if (linear->weight.empty()) continue;
      std::vector<float>& copy = copies.emplace_back(linear->weight.num_elements());
      Dequantize(*linear, model.config.quantization, 0, linear->weight.shape[0], copy.data());
      linear->weight.dtype = DType::kF32;
      linear->weight.data = reinterpret_cast<const std::byte*>(copy.data());
      linear->scale_inv = {};
    }
  }
  const std::vector<float> logits = Runner(model, {.num_blocks = 1}).Prefill(tokens, 5);
  for (size_t i = 0; i < logits.size(); ++i) ASSERT_NEAR(logits[i], expected[i], 1e-4) << i;
}

// The draw depends on the sequence alone: not on its neighbours, their number, or the threads.
TEST(CpuEngineTest, BatchAndThreadsChangeNoDraw) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    StepPlan alone;
    SequenceStep& s = alone.sequences.emplace_back();
    s.id = 1;
    s.num_tokens = 3;
    s.num_blocks = 1;
    s.sample = true;
    s.sampling = {.temperature = 1.5f, .top_p = 0.95f, .top_k = 40, .min_p = 0.01f, .seed = seed};
    alone.tokens = {4, 5, 6};
    alone.blocks = {0};
    StepPlan together = GoodPlan();
    together.sequences.push_back(s);
    together.tokens.insert(together.tokens.end(), {4, 5, 6});
    together.blocks.push_back(7);
    auto one = MakeEngine(1)->Execute(alone);
    auto many = MakeEngine(3)->Execute(together);
    ASSERT_TRUE(one.ok() && many.ok());
    EXPECT_EQ(one->sampled[0], many->sampled[2]);
  }
}

TEST(ThreadPoolTest, EveryIndexOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int repeat = 0; repeat < 2000; ++repeat) {
      const int count = repeat % 37;
      std::vector<int> seen(count, 0);
      pool.For(count, 1 + repeat % 5, [&](int64_t begin, int64_t end, int thread) {
        ASSERT_LT(thread, threads);
        for (int64_t i = begin; i < end; ++i) ++seen[i];
      });
      for (int times : seen) ASSERT_EQ(times, 1);
    }
  }
}

}  // namespace
}  // namespace latentd
