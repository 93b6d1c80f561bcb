#ifndef LATENTD_TESTS_ENGINE_CUDA_ENGINE_HARNESS_H_
#define LATENTD_TESTS_ENGINE_CUDA_ENGINE_HARNESS_H_

#include <filesystem>
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

std::vector<TokenId> SomeTokens(int count, int vocab_size, uint32_t seed);

// How far `actual` is from `expected`: |actual - expected| / |expected| as vectors, and the largest
// difference over the root mean square of `expected`. A NaN makes both infinite.
struct Distance {
  double relative = 0;
  double largest = 0;
};
Distance DistanceOf(const std::vector<float>& actual, const std::vector<float>& expected);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_ENGINE_HARNESS_H_
