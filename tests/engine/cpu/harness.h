#ifndef LATENTD_TESTS_ENGINE_CPU_HARNESS_H_
#define LATENTD_TESTS_ENGINE_CPU_HARNESS_H_

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "engine/cpu/attention.h"
#include "engine/cpu/cpu_model.h"
#include "engine/cpu/forward.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/safetensors.h"
#include "engine/model/weights.h"
#include "engine/step.h"
#include "engine/trace_sink.h"

namespace latentd {

inline constexpr std::string_view kDemoModel = "deploy/demo-model";

struct LoadedModel {
  ModelConfig config;
  ModelWeights weights;
};

// A checkpoint, or random weights for its config.json; a failure ends the test program.
LoadedModel LoadModel(const std::filesystem::path& dir,
                      LoadFormat format = LoadFormat::kSafetensors);

// A golden file; a failure ends the test program.
std::unique_ptr<Checkpoint> OpenGolden(const std::filesystem::path& file);
std::vector<float> GoldenFloats(const Checkpoint& golden, const std::string& name);
std::vector<int32_t> GoldenInts(const Checkpoint& golden, const std::string& name);

// Tokens without a meaning, the same for the same seed.
std::vector<TokenId> SomeTokens(int count, int vocab_size, uint32_t seed);

bool SameBits(const std::vector<float>& a, const std::vector<float>& b);

// Collects named tensors under Transformers' golden names: "layer3_attn_out", "embed", ...
class TraceRecorder : public TraceSink {
 public:
  void Rows(std::string_view name, int layer, const float* data, int rows, int columns,
            ptrdiff_t stride) override;
  void Rows(std::string_view name, int layer, const int32_t* data, int rows, int columns) override;

  std::map<std::string, std::vector<float>> floats;
  std::map<std::string, std::vector<int32_t>> ints;
};

struct RunnerOptions {
  const Kernels* kernels = SupportedKernels().front();
  int num_threads = 2;
  int num_blocks = 160;
  int max_step_tokens = 2048;
  int max_positions = 0;  // 0: the model's
  bool quantize_activations = false;
  bool quantize_cache = false;
  Placement placement = {};  // of a group's rank
};

// The forward pass below CpuEngine: any kernels, every row's logits, a cache full of NaN.
class Runner {
 public:
  explicit Runner(const LoadedModel& model, const RunnerOptions& options = {});

  const ModelConfig& config() const { return model_->config; }
  ThreadPool& pool() { return *pool_; }
  Forward& forward() { return *forward_; }
  LatentCache& cache() { return *cache_; }

  // One sequence's part of a step. `blocks` is its whole table.
  struct Part {
    std::vector<TokenId> tokens;
    int num_computed = 0;
    std::vector<BlockId> blocks;
  };
  static StepPlan MakePlan(const std::vector<Part>& parts);

  // Runs a step and returns the logits of each of its tokens: [tokens, vocab_size].
  std::vector<float> Step(const std::vector<Part>& parts, TraceSink* trace = nullptr);

  // Computes `tokens` from nothing in steps of `chunk`, in blocks first_block, first_block + 1,
  // ...; returns the logits of the last `num_rows` tokens (0: of all).
  std::vector<float> Prefill(const std::vector<TokenId>& tokens, int chunk, int num_rows = 0,
                             BlockId first_block = 0);

  // Prefill, then up to `count` greedy tokens; ends after `eos` (-1: never).
  std::vector<TokenId> Greedy(const std::vector<TokenId>& prompt, int count, TokenId eos);

 private:
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<CpuModel> model_;
  std::unique_ptr<LatentCache> cache_;
  std::unique_ptr<Forward> forward_;
  int max_step_tokens_;
};

std::vector<BlockId> ConsecutiveBlocks(int num_tokens, BlockId first = 0);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CPU_HARNESS_H_
