#ifndef LATENTD_TESTS_ENGINE_CUDA_GROUP_HARNESS_H_
#define LATENTD_TESTS_ENGINE_CUDA_GROUP_HARNESS_H_

#include <filesystem>
#include <memory>
#include <vector>

#include "engine/cuda/cuda_engine.h"
#include "engine/local_group.h"
#include "engine/model/config.h"
#include "tests/engine/cuda/engine_harness.h"

namespace latentd {

// All ranks of a group, a thread each: on one GPU, or each on its own.
struct GpuGroup {
  std::vector<CudaEngine*> ranks;
  std::unique_ptr<LocalGroup> group;  // owns them
};
// `exchanges`: nullptr is NCCL, rank r on GPU r. Ends the test program when it cannot be made.
GpuGroup MakeGpuGroup(const ModelConfig& config, const std::filesystem::path& dir,
                      LoadFormat format, CudaEngineOptions options, int world_size,
                      const ExchangeFactory& exchanges, const std::vector<TraceSink*>& traces = {});

// A group whose logits can be seen.
class GroupRunner {
 public:
  GroupRunner(const ModelConfig& config, const std::filesystem::path& dir, LoadFormat format,
              const CudaEngineOptions& options, int world_size);

  // Runs a step in which each part is sampled on its rank; returns the logits after each part's
  // last token, [parts, vocab_size], in the parts' order.
  std::vector<float> Step(const std::vector<Runner::Part>& parts, const std::vector<int>& rank_of);

 private:
  const ModelConfig config_;
  std::vector<std::unique_ptr<TraceRecorder>> traces_;  // of each rank
  GpuGroup group_;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_GROUP_HARNESS_H_
