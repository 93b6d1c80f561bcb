#include "tests/engine/cuda/engine_harness.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>

namespace latentd {

std::unique_ptr<CudaEngine> MakeCudaEngine(const ModelConfig& config,
                                           const std::filesystem::path& dir, LoadFormat format,
                                           const CudaEngineOptions& options) {
  auto engine = CudaEngine::Create(config, dir, format, options, nullptr, nullptr);
  if (!engine.ok()) {
    std::fprintf(stderr, "CudaEngine::Create: %s\n", engine.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(engine);
}

CudaRunner::CudaRunner(const ModelConfig& config, const std::filesystem::path& dir,
                       LoadFormat format, CudaEngineOptions options)
    : config_(config), trace_(std::make_unique<TraceRecorder>()) {
  options.trace = trace_.get();
  engine_ = MakeCudaEngine(config, dir, format, options);
}

std::vector<float> CudaRunner::Step(const std::vector<Runner::Part>& parts) {
  StepPlan plan = Runner::MakePlan(parts);
  for (SequenceStep& s : plan.sequences) {
    s.sample = true;
    s.sampling.temperature = 0;
  }
  trace_->floats.clear();
  trace_->ints.clear();
  const auto result = engine_->Execute(plan);
  if (!result.ok()) {
    std::fprintf(stderr, "CudaEngine::Execute: %s\n", result.status().ToString().c_str());
    for (const auto& [name, values] : trace_->floats) {
      size_t bad = 0;
      for (float value : values) bad += !std::isfinite(value);
      if (bad > 0)
        std::fprintf(stderr, "  %s: %zu of %zu are not finite\n", name.c_str(), bad, values.size());
    }
    return std::vector<float>(parts.size() * config_.vocab_size, NAN);
  }
  return trace_->floats["logits"];
}

std::vector<float> CudaRunner::Prefill(const std::vector<TokenId>& tokens, int chunk,
                                       BlockId first_block) {
  const int length = static_cast<int>(tokens.size());
  std::vector<float> logits;
  for (int begin = 0; begin < length; begin += chunk) {
    const int end = std::min(begin + chunk, length);
    logits = Step({{.tokens = {tokens.begin() + begin, tokens.begin() + end},
                    .num_computed = begin,
                    .blocks = ConsecutiveBlocks(length, first_block)}});
  }
  return logits;
}

EngineComparison::EngineComparison(const ModelConfig& config, const ModelWeights& weights,
                                   const std::filesystem::path& dir, LoadFormat format,
                                   const CudaEngineOptions& options, int num_threads)
    : exact_({config, weights}, {.num_threads = num_threads,
                                 .num_blocks = options.num_blocks,
                                 .max_step_tokens = options.max_step_tokens,
                                 .max_positions = options.max_model_len}),
      oracle_({config, weights}, {.num_threads = num_threads,
                                  .num_blocks = options.num_blocks,
                                  .max_step_tokens = options.max_step_tokens,
                                  .max_positions = options.max_model_len,
                                  .quantize_activations = true,
                                  .quantize_cache = options.cache_format == CacheFormat::kFp8}),
      cuda_(config, dir, format, options) {}

void EngineComparison::Step(const std::vector<Runner::Part>& parts) {
  TraceRecorder exact, oracle;
  const std::vector<float> exact_logits = exact_.Step(parts, &exact);
  const std::vector<float> oracle_logits = oracle_.Step(parts, &oracle);
  const std::vector<float> logits = cuda_.Step(parts);
  const size_t vocab = cuda_.config().vocab_size;
  std::vector<float> exact_last, oracle_last;  // of each part
  size_t rows = 0;
  for (const Runner::Part& part : parts) {
    rows += part.tokens.size();
    exact_last.insert(exact_last.end(), exact_logits.begin() + (rows - 1) * vocab,
                      exact_logits.begin() + rows * vocab);
    oracle_last.insert(oracle_last.end(), oracle_logits.begin() + (rows - 1) * vocab,
                       oracle_logits.begin() + rows * vocab);
  }
  Add("logits", logits, oracle_last, exact_last, parts.size());
  for (const auto& [name, values] : cuda_.trace().floats) {
    const bool of_layer = name.rfind("layer", 0) == 0 && name.find("expert") == std::string::npos;
    if (of_layer) Add(name, values, oracle.floats[name], exact.floats[name], rows);
  }
}

void EngineComparison::Add(const std::string& name, const std::vector<float>& cuda,
                           const std::vector<float>& oracle, const std::vector<float>& exact,
                           size_t rows) {
  ASSERT_EQ(cuda.size(), exact.size()) << name;
  const size_t columns = cuda.size() / rows;
  const auto row = [&](const std::vector<float>& all, size_t i) {
    return std::vector<float>(all.begin() + i * columns, all.begin() + (i + 1) * columns);
  };
  Distances& distances = distances_[name];
  for (size_t i = 0; i < rows; ++i) {
    const std::vector<float> of_oracle = row(oracle, i);
    distances.cuda.push_back(DistanceOf(row(cuda, i), of_oracle).relative);
    distances.oracle.push_back(DistanceOf(of_oracle, row(exact, i)).relative);
  }
}

void EngineComparison::Check(const std::string& title, double floor) const {
  const auto median = [](std::vector<double> values) {
    std::nth_element(values.begin(), values.begin() + values.size() / 2, values.end());
    return values[values.size() / 2];
  };
  double largest = 0, largest_oracle = 0;
  for (const auto& [name, distances] : distances_) {
    const double cuda = median(distances.cuda), oracle = median(distances.oracle);
    EXPECT_LE(cuda, 2 * oracle + floor) << title << ": " << name << ", the oracle " << oracle;
    largest = std::max(largest, cuda);
    largest_oracle = std::max(largest_oracle, oracle);
  }
  const Distances& logits = distances_.at("logits");
  std::printf(
      "%s: median distances from the oracle: logits %.4f, any tensor %.4f; of the oracle from "
      "exact "
      "activations: %.4f, %.4f\n",
      title.c_str(), median(logits.cuda), largest, median(logits.oracle), largest_oracle);
}

Distance DistanceOf(const std::vector<float>& actual, const std::vector<float>& expected) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  if (actual.size() != expected.size()) return {kInfinity, kInfinity};
  double difference = 0.0, norm = 0.0, largest = 0.0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double d = double{actual[i]} - expected[i];
    if (!std::isfinite(d)) return {kInfinity, kInfinity};
    difference += d * d;
    norm += double{expected[i]} * expected[i];
    largest = std::max(largest, std::abs(d));
  }
  return {std::sqrt(difference / norm), largest / std::sqrt(norm / actual.size())};
}

}  // namespace latentd
