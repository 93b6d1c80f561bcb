// The CUDA engine on the demo model against Hugging Face Transformers in fp32 (tests/golden/model)
// and against the CPU engine.
//
// The tolerance of the bf16 variant: activations are rounded to bf16, with a relative error of at
// most u = 2^-9, about three times in each of a layer's halves (its input, what lies between its
// products, its output); the residual stream and all sums are f32. Errors of random sign add up in
// quadrature: the input of the head, and so the logits as a vector, are off by about
// u sqrt(3 / 3) sqrt(2 * 5 layers) = 0.6 %. One logit among millions lies within eight such
// deviations:
//   |difference| <= 8 * 2^-9 * sqrt(10) * rms of the logits.
// The FP8 variant rounds the inputs of its products to e4m3, whose error is 2^-4 / sqrt(6) in the
// root mean square: that in place of u gives its tolerance against Transformers, which does not
// round. Against the CPU engine with quantize_activations engine_harness.h's yardstick holds.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/engine/cuda/device_test.h"
#include "tests/engine/cuda/engine_harness.h"

namespace latentd {
namespace {

constexpr char kGolden[] = "tests/golden/model";

nlohmann::json ReadJson(const std::filesystem::path& file) {
  return nlohmann::json::parse(std::ifstream(file));
}

double RootMeanSquare(const std::vector<float>& values) {
  double sum = 0.0;
  for (float value : values) sum += double{value} * value;
  return std::sqrt(sum / values.size());
}

class CudaGoldenTest : public DeviceTest, public ::testing::WithParamInterface<std::string> {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    if (IsSkipped()) return;
    dir_ = kDemoModel;
    if (bf16()) {
      const char* dir = std::getenv("LATENTD_DEMO_BF16");
      if (dir == nullptr) GTEST_SKIP() << "needs LATENTD_DEMO_BF16, the folder of the bf16 weights";
      dir_ = dir;
    }
    auto config = LoadModelConfig(dir_);
    ASSERT_TRUE(config.ok()) << config.status();
    config_ = *config;
    config_.max_position_embeddings = 12288;  // one prompt is longer than the model's own limit
  }
  bool bf16() const { return GetParam() == "bf16"; }
  std::filesystem::path golden(const char* name) const {
    return std::filesystem::path(kGolden) / GetParam() / name;
  }
  // Of a logit, as a share of the logits' rms.
  double tolerance() const {
    return 8 * (bf16() ? 0x1p-9 : 0x1p-4 / std::sqrt(6.0)) * std::sqrt(10.0);
  }

  CudaEngineOptions Options() const {
    return {.num_blocks = 160, .max_step_tokens = 2048, .max_sequences = 4};
  }
  LoadedModel Model() const {
    LoadedModel model = LoadModel(dir_);
    model.config = config_;
    return model;
  }

  std::filesystem::path dir_;
  ModelConfig config_;
};

TEST_P(CudaGoldenTest, TraceTensorsAreTransformers) {
  const auto golden = OpenGolden(this->golden("trace.safetensors"));
  std::vector<TokenId> ids = GoldenInts(*golden, "ids");
  ids.pop_back();  // the last is the MTP layer's
  CudaRunner runner(config_, dir_, LoadFormat::kSafetensors, Options());
  runner.Step({{.tokens = ids, .num_computed = 0, .blocks = ConsecutiveBlocks(ids.size())}});
  TraceRecorder& trace = runner.trace();
  int compared = 0;
  for (const auto& [name, tensor] : golden->tensors()) {
    if (tensor.dtype != DType::kF32 || trace.floats.count(std::string(name)) == 0) continue;
    // Weights of other experts are no rounding's matter.
    if (absl::EndsWith(name, "expert_weights")) continue;
    std::vector<float> expected = GoldenFloats(*golden, std::string(name));
    const std::vector<float>& actual = trace.floats[std::string(name)];
    if (name == "logits" || name == "final_hidden")  // the engine computes the last token's
      expected.erase(expected.begin(), expected.end() - actual.size());
    ++compared;
    const Distance distance = DistanceOf(actual, expected);
    // Vectors: an eighth of what one element may have, and the roundings of a single product.
    EXPECT_LE(distance.relative, tolerance() / 8) << name;
    if (name == "logits" || absl::StrContains(name, "layer4"))
      std::printf("%s %s: relative %.5f\n", GetParam().c_str(), std::string(name).c_str(),
                  distance.relative);
  }
  EXPECT_EQ(compared, 3 + 5 * 6)
      << "embed, final_hidden, logits; q, c_kv, k_pe, attn_out, mlp_out, out";
}

// Half of each prompt as one chunk, the rest token by token: every token's logits.
TEST_P(CudaGoldenTest, LogitsAndExpertsAreTransformers) {
  const auto golden = OpenGolden(this->golden("logits.safetensors"));
  CudaRunner runner(config_, dir_, LoadFormat::kSafetensors, Options());
  Runner reference(Model(), {.num_threads = 8, .quantize_activations = !bf16()});
  Runner exact(Model(), {.num_threads = 8});
  const int k = config_.num_experts_per_tok;
  int64_t same_experts = 0, same_experts_cpu = 0, choices = 0;
  double largest = 0, largest_cpu = 0, relative_cpu = 0;
  int prompts = 0;
  for (const auto& prompt : ReadJson(std::filesystem::path(kGolden) / "prompts.json")) {
    const std::string id = prompt["id"];
    if (golden->Find(id + "/top_ids") == nullptr) continue;
    SCOPED_TRACE(id);
    ++prompts;
    const std::vector<TokenId> tokens = prompt["ids"];
    const std::vector<int32_t> top_ids = GoldenInts(*golden, id + "/top_ids");
    const std::vector<float> top_logits = GoldenFloats(*golden, id + "/top_logits");
    const int length = static_cast<int>(tokens.size()), half = std::max(1, length / 2);
    const std::vector<Runner::Part> whole = {
        {.tokens = tokens, .num_computed = 0, .blocks = ConsecutiveBlocks(length)}};
    TraceRecorder cpu, cpu_exact;
    const std::vector<float> cpu_logits = reference.Step(whole, &cpu);
    exact.Step(whole, &cpu_exact);
    for (int begin = 0; begin < length;) {
      const int end = begin == 0 ? half : begin + 1;
      const std::vector<float> logits =
          runner.Step({{.tokens = {tokens.begin() + begin, tokens.begin() + end},
                        .num_computed = begin,
                        .blocks = ConsecutiveBlocks(length)}});
      const int row = end - 1;
      const double rms = RootMeanSquare(logits);
      for (int j = 0; j < 20; ++j) {
        const double difference = logits[top_ids[row * 20 + j]] - double{top_logits[row * 20 + j]};
        largest = std::max(largest, std::abs(difference) / rms);
      }
      const Distance distance =
          DistanceOf(logits, {cpu_logits.begin() + size_t(row) * config_.vocab_size,
                              cpu_logits.begin() + size_t(row + 1) * config_.vocab_size});
      largest_cpu = std::max(largest_cpu, distance.largest);
      relative_cpu = std::max(relative_cpu, distance.relative);
      for (int layer = config_.first_k_dense_replace; layer < config_.num_hidden_layers; ++layer) {
        const std::string name = absl::StrCat("layer", layer, "_experts");
        const std::vector<int32_t>& actual = runner.trace().ints[name];
        for (int i = 0; i < end - begin; ++i, ++choices) {
          const auto of_cpu = cpu.ints[name].begin() + (begin + i) * k;
          same_experts += std::equal(actual.begin() + i * k, actual.begin() + (i + 1) * k, of_cpu);
          same_experts_cpu +=
              std::equal(of_cpu, of_cpu + k, cpu_exact.ints[name].begin() + (begin + i) * k);
        }
      }
      begin = end;
    }
  }
  const double agreement = static_cast<double>(same_experts) / choices;
  const double oracle_agreement = static_cast<double>(same_experts_cpu) / choices;
  std::printf(
      "%s: largest top-20 logit difference %.4f of rms (tolerance %.4f); from the CPU engine %.4f, "
      "as "
      "vectors %.4f; experts %.4f of %ld (the CPU engine's own, exact activations or not: %.4f)\n",
      GetParam().c_str(), largest, tolerance(), largest_cpu, relative_cpu, agreement, choices,
      oracle_agreement);
  EXPECT_EQ(prompts, 12);
  EXPECT_LE(largest, tolerance());
  EXPECT_LE(largest_cpu, tolerance());
  EXPECT_GE(agreement, bf16() ? 0.995 : oracle_agreement - 0.01);
}

TEST_P(CudaGoldenTest, GreedyContinuationsAreTransformers) {
  const auto greedy = ReadJson(golden("greedy.json"));
  CudaRunner runner(config_, dir_, LoadFormat::kSafetensors, Options());
  int prompts = 0, exact = 0;
  for (const auto& prompt : ReadJson(std::filesystem::path(kGolden) / "prompts.json")) {
    const std::string id = prompt["id"];
    SCOPED_TRACE(id);
    ++prompts;
    const std::vector<TokenId> tokens = prompt["ids"];
    const auto expected = greedy[id]["tokens"].get<std::vector<TokenId>>();
    const auto gaps = greedy[id]["gaps"].get<std::vector<double>>();
    const int length = static_cast<int>(tokens.size());
    std::vector<float> logits = runner.Prefill(tokens, 2048);
    bool same = true;
    for (size_t i = 0; i < expected.size() && same; ++i) {
      const auto token =
          static_cast<TokenId>(std::max_element(logits.begin(), logits.end()) - logits.begin());
      if (token != expected[i]) {
        // Two logits may move towards one another.
        EXPECT_LE(gaps[i], 2 * tolerance() * RootMeanSquare(logits)) << "token " << i;
        std::printf("%s %s: token %zu differs, gap %.3f\n", GetParam().c_str(), id.c_str(), i,
                    gaps[i]);
        same = false;
      }
      if (i + 1 == expected.size()) break;
      logits = runner.Step({{.tokens = {token},
                             .num_computed = length + static_cast<int>(i),
                             .blocks = ConsecutiveBlocks(length + 64)}});
    }
    exact += same;
  }
  std::printf("%s: %d of %d continuations are the same\n", GetParam().c_str(), exact, prompts);
  EXPECT_EQ(prompts, 24);
  EXPECT_GE(exact, bf16() ? 23 : 20);
}

INSTANTIATE_TEST_SUITE_P(, CudaGoldenTest, ::testing::Values("fp8", "bf16"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace latentd
