#include "tests/engine/cuda/engine_harness.h"

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

std::vector<TokenId> SomeTokens(int count, int vocab_size, uint32_t seed) {
  std::vector<TokenId> tokens(count);
  for (TokenId& token : tokens) {
    seed = seed * 1664525u + 1013904223u;
    token = static_cast<TokenId>((seed >> 8) % vocab_size);
  }
  return tokens;
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
