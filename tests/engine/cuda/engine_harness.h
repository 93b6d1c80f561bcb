#ifndef LATENTD_TESTS_ENGINE_CUDA_ENGINE_HARNESS_H_
#define LATENTD_TESTS_ENGINE_CUDA_ENGINE_HARNESS_H_

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/cuda/cuda_engine.h"
#include "engine/model/config.h"
#include "engine/step.h"
#include "tests/engine/cpu/harness.h"

namespace latentd {

// A CudaEngine whose logits can be seen. Ends the test program when it cannot be made.
class CudaRunner {
 public:
  CudaRunner(const ModelConfig& config, const std::filesystem::path& dir, LoadFormat format,
             CudaEngineOptions options);

  CudaEngine& engine() { return *engine_; }
  const ModelConfig& config() const { return config_; }
  // Of the last step.
  TraceRecorder& trace() { return *trace_; }

  // Runs a step in which each part is sampled, and returns the logits after each part's last token:
  // [parts, vocab_size].
  std::vector<float> Step(const std::vector<Runner::Part>& parts);

  // Computes `tokens` from nothing in steps of `chunk`, in blocks first_block, first_block + 1,
  // ...; returns the logits after the last token.
  std::vector<float> Prefill(const std::vector<TokenId>& tokens, int chunk,
                             BlockId first_block = 0);

 private:
  const ModelConfig config_;
  std::unique_ptr<TraceRecorder> trace_;
  std::unique_ptr<CudaEngine> engine_;
};

// An engine that runs its steps as they are served: graphs where there are any, no trace.
std::unique_ptr<CudaEngine> MakeCudaEngine(const ModelConfig& config,
                                           const std::filesystem::path& dir, LoadFormat format,
                                           const CudaEngineOptions& options);

// The CUDA engine beside the CPU engine with FP8 activations, and the cache rounded as the CUDA
// engine holds it (the oracle), and beside the exact CPU engine.
//
// Rounding an activation to e4m3 is discontinuous: an input that another order of a sum has moved a
// little takes the neighbouring number now and then, a step of 2^-4, and after two or three
// products in a row the roundings of two correct engines have little in common. So the oracle's own
// distance from exact activations is the yardstick: independent roundings of the same size differ
// by sqrt(2) of it. Medians over tokens, because a token whose experts are a near tie may go
// another way.
class EngineComparison {
 public:
  EngineComparison(const ModelConfig& config, const ModelWeights& weights,
                   const std::filesystem::path& dir, LoadFormat format,
                   const CudaEngineOptions& options, int num_threads);

  // Runs a step on all three and remembers how far each token's tensors and logits are apart.
  void Step(const std::vector<Runner::Part>& parts);

  // Every tensor's median distance from the oracle is at most twice the oracle's from exact
  // activations (sqrt(2), and a few dozen tokens make a rough median), and `floor` more for what is
  // rounded to bf16. Prints the largest of each.
  void Check(const std::string& title, double floor) const;
  void Clear() { distances_.clear(); }

 private:
  struct Distances {
    std::vector<double> cuda, oracle;  // of rows
  };
  void Add(const std::string& name, const std::vector<float>& cuda,
           const std::vector<float>& oracle, const std::vector<float>& exact, size_t rows);

  Runner exact_, oracle_;
  CudaRunner cuda_;
  std::map<std::string, Distances> distances_;
};

// How far `actual` is from `expected`: |actual - expected| / |expected| as vectors, and the largest
// difference over the root mean square of `expected`. A NaN makes both infinite.
struct Distance {
  double relative = 0;
  double largest = 0;
};
Distance DistanceOf(const std::vector<float>& actual, const std::vector<float>& expected);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_ENGINE_HARNESS_H_
