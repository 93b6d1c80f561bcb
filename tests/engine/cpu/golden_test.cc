// The CPU engine against Hugging Face Transformers in fp32: the demo model, FP8 and bf16, and the
// tiny checkpoints that each vary one thing of the configuration.

#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "tests/engine/cpu/harness.h"

namespace latentd {
namespace {

constexpr char kGolden[] = "tests/golden/model";
constexpr int kMaxGoldenPositions = 12288;  // one prompt is longer than the model's own limit

nlohmann::json ReadJson(const std::filesystem::path& file) {
  return nlohmann::json::parse(std::ifstream(file));
}

double LargestDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - b[i]);
    if (!(difference <= largest)) largest = difference;
  }
  return largest;
}

double Largest(const std::vector<float>& a) {
  return LargestDifference(a, std::vector<float>(a.size(), 0.0f));
}

class DemoModelTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    std::filesystem::path dir = kDemoModel;
    if (GetParam() == "bf16") {
      const char* bf16 = std::getenv("LATENTD_DEMO_BF16");
      if (bf16 == nullptr)
        GTEST_SKIP() << "needs LATENTD_DEMO_BF16, the folder of the bf16 weights";
      dir = bf16;
    }
    model_ = LoadModel(dir);
  }
  std::filesystem::path golden(const char* name) const {
    return std::filesystem::path(kGolden) / GetParam() / name;
  }

  LoadedModel model_;
};

// Transformers also has tensors of the MTP layer, which this engine does not run.
TEST_P(DemoModelTest, EveryTraceTensorIsTransformers) {
  const auto golden = OpenGolden(this->golden("trace.safetensors"));
  std::vector<TokenId> ids = GoldenInts(*golden, "ids");
  ids.pop_back();  // the last is the MTP layer's
  for (const Kernels* kernels : SupportedKernels()) {
    SCOPED_TRACE(kernels->name);
    Runner runner(model_, {.kernels = kernels});
    TraceRecorder trace;
    runner.Step({{.tokens = ids, .num_computed = 0, .blocks = ConsecutiveBlocks(ids.size())}},
                &trace);
    int compared = 0;
    for (const auto& [name, tensor] : golden->tensors()) {
      if (name == "ids" || absl::StartsWith(name, "mtp_")) continue;
      SCOPED_TRACE(name);
      ++compared;
      if (tensor.dtype == DType::kI32) {
        EXPECT_EQ(trace.ints[name], GoldenInts(*golden, name));
        continue;
      }
      const std::vector<float> expected = GoldenFloats(*golden, name);
      const std::vector<float>& actual = trace.floats[name];
      ASSERT_EQ(actual.size(), expected.size());
      EXPECT_LE(LargestDifference(actual, expected), 1e-3 * Largest(expected));
    }
    EXPECT_EQ(compared, 3 + 5 * 6 + 4 * 4);
  }
}

TEST_P(DemoModelTest, TopLogitsAreTransformers) {
  const auto golden = OpenGolden(this->golden("logits.safetensors"));
  Runner runner(model_, {.max_positions = kMaxGoldenPositions});
  int prompts = 0;
  double largest = 0.0;
  for (const auto& prompt : ReadJson(std::filesystem::path(kGolden) / "prompts.json")) {
    const std::string id = prompt["id"];
    if (golden->Find(id + "/top_ids") == nullptr) continue;
    SCOPED_TRACE(id);
    ++prompts;
    const std::vector<int32_t> top_ids = GoldenInts(*golden, id + "/top_ids");
    const std::vector<float> top_logits = GoldenFloats(*golden, id + "/top_logits");
    const int rows = static_cast<int>(top_ids.size()) / 20;
    const std::vector<float> logits = runner.Prefill(prompt["ids"], 2048, rows);
    const size_t vocab = runner.config().vocab_size;
    ASSERT_EQ(logits.size(), rows * vocab);
    std::vector<float> actual(top_ids.size());
    for (size_t i = 0; i < top_ids.size(); ++i) actual[i] = logits[i / 20 * vocab + top_ids[i]];
    const double difference = LargestDifference(actual, top_logits);
    largest = std::max(largest, difference);
    EXPECT_LE(difference, 2e-3);
  }
  EXPECT_EQ(prompts, 12);
  RecordProperty("largest_logit_difference", absl::StrCat(largest));
}

TEST_P(DemoModelTest, EveryGreedyContinuationIsTransformers) {
  const auto greedy = ReadJson(golden("greedy.json"));
  Runner runner(model_, {.max_positions = kMaxGoldenPositions});
  int prompts = 0;
  for (const auto& prompt : ReadJson(std::filesystem::path(kGolden) / "prompts.json")) {
    const std::string id = prompt["id"];
    SCOPED_TRACE(id);
    ++prompts;
    EXPECT_EQ(runner.Greedy(prompt["ids"], 64, 1),
              greedy[id]["tokens"].get<std::vector<TokenId>>());
  }
  EXPECT_EQ(prompts, 24);
}

// FP8 activations, and keys, are no longer Transformers' numbers: how far they drift, so that
// another engine which rounds them can be judged.
struct Drift {
  double largest = 0, rms = 0;  // of the goldens' top 20 logits
  int64_t rows = 0, same_top_1 = 0, prompts = 0, same_continuations = 0;
};

Drift MeasureDrift(bool quantize_activations, bool quantize_cache) {
  const std::filesystem::path dir = std::filesystem::path(kGolden) / "fp8";
  const auto golden = OpenGolden(dir / "logits.safetensors");
  const auto greedy = ReadJson(dir / "greedy.json");
  Runner runner(LoadModel(kDemoModel), {.max_positions = kMaxGoldenPositions,
                                        .quantize_activations = quantize_activations,
                                        .quantize_cache = quantize_cache});
  const size_t vocab = runner.config().vocab_size;
  double largest = 0.0, squares = 0.0;
  int64_t compared = 0, top_1 = 0, rows_compared = 0, same_continuations = 0, prompts = 0;
  for (const auto& prompt : ReadJson(std::filesystem::path(kGolden) / "prompts.json")) {
    const std::string id = prompt["id"];
    ++prompts;
    same_continuations +=
        runner.Greedy(prompt["ids"], 64, 1) == greedy[id]["tokens"].get<std::vector<TokenId>>();
    if (golden->Find(id + "/top_ids") == nullptr) continue;
    const std::vector<int32_t> top_ids = GoldenInts(*golden, id + "/top_ids");
    const std::vector<float> top_logits = GoldenFloats(*golden, id + "/top_logits");
    const int rows = static_cast<int>(top_ids.size()) / 20;
    const std::vector<float> logits = runner.Prefill(prompt["ids"], 2048, rows);
    for (size_t i = 0; i < top_ids.size(); ++i) {
      const double difference = std::abs(logits[i / 20 * vocab + top_ids[i]] - top_logits[i]);
      largest = std::max(largest, difference);
      squares += difference * difference;
      ++compared;
    }
    for (int row = 0; row < rows; ++row, ++rows_compared) {
      const auto begin = logits.begin() + row * vocab;
      top_1 += std::max_element(begin, begin + vocab) - begin == top_ids[row * 20];
    }
  }
  const Drift drift = {
      largest, std::sqrt(squares / compared), rows_compared, top_1, prompts, same_continuations};
  testing::Test::RecordProperty("largest_logit_difference", absl::StrCat(drift.largest));
  testing::Test::RecordProperty("rms_logit_difference", absl::StrCat(drift.rms));
  testing::Test::RecordProperty("same_top_1", absl::StrCat(top_1, " of ", rows_compared));
  testing::Test::RecordProperty("same_continuations",
                                absl::StrCat(same_continuations, " of ", prompts));
  std::printf("largest %.3f, rms %.3f, top 1 %ld of %ld, continuations %ld of %ld\n", drift.largest,
              drift.rms, top_1, rows_compared, same_continuations, prompts);
  return drift;
}

TEST(QuantizedDemoModelTest, DriftsLittle) {
  const Drift drift = MeasureDrift(/*quantize_activations=*/true, /*quantize_cache=*/false);
  // Measured: 2.01, 0.127, 1791 of 2165 and 24 of 24.
  EXPECT_GT(drift.largest, 2e-3);  // it does round
  EXPECT_LE(drift.rms, 0.2);
  EXPECT_GE(drift.same_top_1, drift.rows * 8 / 10);
  EXPECT_GE(drift.same_continuations, 23);
}

TEST(QuantizedDemoModelTest, AnFp8CacheDriftsLittle) {
  const Drift drift = MeasureDrift(/*quantize_activations=*/false, /*quantize_cache=*/true);
  EXPECT_GT(drift.largest, 2e-3);
  EXPECT_LE(drift.rms, 0.1);
  EXPECT_GE(drift.same_top_1, drift.rows * 8 / 10);
  EXPECT_GE(drift.same_continuations, 23);
}

INSTANTIATE_TEST_SUITE_P(, DemoModelTest, ::testing::Values("fp8", "bf16"),
                         [](const auto& info) { return info.param; });

std::vector<std::string> Variants() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/variants")) {
    if (entry.is_directory()) names.push_back(entry.path().filename());
  }
  std::sort(names.begin(), names.end());
  return names;
}

class VariantTest : public ::testing::TestWithParam<std::string> {};

TEST_P(VariantTest, IsTransformers) {
  const std::filesystem::path dir = std::filesystem::path("tests/golden/variants") / GetParam();
  const LoadedModel model = LoadModel(dir);
  const auto golden = OpenGolden(dir / "golden.safetensors");
  const std::vector<TokenId> ids = GoldenInts(*golden, "ids");
  const std::vector<float> expected = GoldenFloats(*golden, "logits");
  const std::vector<TokenId> greedy = GoldenInts(*golden, "greedy");
  for (const Kernels* kernels : SupportedKernels()) {
    SCOPED_TRACE(kernels->name);
    Runner runner(model, {.kernels = kernels});
    const std::vector<float> logits = runner.Prefill(ids, 2048);
    ASSERT_EQ(logits.size(), expected.size());
    EXPECT_LE(LargestDifference(logits, expected), 1e-3 * Largest(expected));
    EXPECT_EQ(runner.Greedy(ids, static_cast<int>(greedy.size()), -1), greedy);
  }
}

INSTANTIATE_TEST_SUITE_P(, VariantTest, ::testing::ValuesIn(Variants()),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace latentd
