#include "engine/cpu/cpu_engine.h"

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/attention.h"
#include "engine/cpu/cpu_model.h"
#include "engine/cpu/forward.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/sampler.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model/host_memory.h"
#include "engine/plan_check.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kLogitRows = 32;  // sequences whose logits are in memory together

absl::Status CheckOption(const char* name, int64_t value, int64_t lowest) {
  if (value >= lowest) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(name, ": ", value, "; the least is ", lowest));
}

absl::Status CheckMemory(const ModelConfig& config, const ModelWeights& weights,
                         const CpuEngineOptions& options, int32_t max_model_len) {
  const uint64_t packed = CpuModel::NumBytes(config, weights, max_model_len);
  const uint64_t cache = LatentCache::NumBytes(config, options.num_blocks);
  const uint64_t activations = Forward::NumBytes(config, options.max_step_tokens) +
                               uint64_t{sizeof(float)} * kLogitRows * config.vocab_size;
  const uint64_t available = AvailableMemoryBytes();
  if (packed + cache + activations <= available) return absl::OkStatus();
  constexpr double kMiB = 1 << 20;
  return absl::ResourceExhaustedError(absl::StrFormat(
      "the CPU engine needs %.0f MiB: packed weights %.0f, KV cache %.0f (%d blocks), activations "
      "%.0f (%d tokens a step); %.0f MiB are available",
      (packed + cache + activations) / kMiB, packed / kMiB, cache / kMiB, options.num_blocks,
      activations / kMiB, options.max_step_tokens, available / kMiB));
}

class CpuEngineImpl : public CpuEngine {
 public:
  CpuEngineImpl(std::unique_ptr<ThreadPool> pool, std::unique_ptr<CpuModel> model,
                const EngineInfo& info)
      : info_(info),
        pool_(std::move(pool)),
        model_(std::move(model)),
        cache_(model_->config, info.num_blocks),
        forward_(*model_, *SupportedKernels().front(), *pool_, cache_, info.max_step_tokens),
        plan_check_(info),
        logits_(size_t{kLogitRows} * info.vocab_size),
        samplers_(pool_->num_threads()) {}

  bool ok() const { return cache_.ok(); }
  EngineInfo info() const override { return info_; }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    RETURN_IF_ERROR(plan_check_.Check(plan));
    if (plan.empty()) return StepResult();
    forward_.Run(plan);
    return SampleAll(plan);
  }

 private:
  // A sequence that gets a token.
  struct Draw {
    const SequenceStep* sequence;
    absl::Span<const TokenId> suppressed;
  };

  absl::StatusOr<StepResult> SampleAll(const StepPlan& plan) {
    std::vector<int32_t> rows;
    std::vector<Draw> draws;
    int32_t next_row = 0;
    const TokenId* suppressed = plan.suppressed.data();
    for (const SequenceStep& s : plan.sequences) {
      next_row += s.num_tokens;
      if (s.sample) {
        rows.push_back(next_row - 1);
        draws.push_back({&s, absl::MakeConstSpan(suppressed, s.num_suppressed)});
      }
      suppressed += s.num_suppressed;
    }
    StepResult result;
    result.sampled.resize(rows.size());
    for (size_t begin = 0; begin < rows.size(); begin += kLogitRows) {
      const size_t count = std::min<size_t>(rows.size() - begin, kLogitRows);
      forward_.Logits(absl::MakeConstSpan(rows).subspan(begin, count), logits_.data());
      RETURN_IF_ERROR(SampleRows(absl::MakeConstSpan(draws).subspan(begin, count),
                                 result.sampled.data() + begin));
    }
    return result;
  }

  // Draws from logits_ [draws, vocab_size].
  absl::Status SampleRows(absl::Span<const Draw> draws, TokenId* sampled) {
    std::vector<absl::Status> errors(draws.size());
    const size_t vocab = info_.vocab_size;
    pool_->For(static_cast<int64_t>(draws.size()), 1, [&](int64_t i, int64_t, int thread) {
      const SequenceStep& s = *draws[i].sequence;
      absl::StatusOr<TokenId> token = samplers_[thread].Sample(
          absl::MakeSpan(logits_).subspan(i * vocab, vocab), draws[i].suppressed, s.sampling,
          int64_t{s.num_computed_tokens} + s.num_tokens);
      if (token.ok()) {
        sampled[i] = *token;
      } else {
        errors[i] = token.status();
      }
    });
    for (size_t i = 0; i < draws.size(); ++i) {
      if (errors[i].ok()) continue;
      return absl::Status(errors[i].code(), absl::StrCat("sequence ", draws[i].sequence->id, ": ",
                                                         errors[i].message()));
    }
    return absl::OkStatus();
  }

  const EngineInfo info_;
  std::unique_ptr<ThreadPool> pool_;
  std::unique_ptr<CpuModel> model_;
  LatentCache cache_;
  Forward forward_;
  PlanCheck plan_check_;
  AlignedVector<float> logits_;    // [kLogitRows, vocab_size]
  std::vector<Sampler> samplers_;  // [threads]
};

}  // namespace

absl::StatusOr<std::unique_ptr<CpuEngine>> CpuEngine::Create(const ModelConfig& config,
                                                             const ModelWeights& weights,
                                                             const CpuEngineOptions& options) {
  RETURN_IF_ERROR(CheckOption("num_threads", options.num_threads, 0));
  RETURN_IF_ERROR(CheckOption("num_blocks", options.num_blocks, 1));
  RETURN_IF_ERROR(CheckOption("max_step_tokens", options.max_step_tokens, 1));
  RETURN_IF_ERROR(CheckOption("max_sequences", options.max_sequences, 1));
  RETURN_IF_ERROR(CheckOption("max_model_len", options.max_model_len, 0));
  if (options.max_model_len > config.max_position_embeddings) {
    return absl::InvalidArgumentError(absl::StrCat("max_model_len: ", options.max_model_len,
                                                   "; the model's max_position_embeddings is ",
                                                   config.max_position_embeddings));
  }
  const int32_t max_model_len =
      options.max_model_len > 0 ? options.max_model_len : config.max_position_embeddings;
  RETURN_IF_ERROR(CheckMemory(config, weights, options, max_model_len));

  auto pool = std::make_unique<ThreadPool>(options.num_threads > 0 ? options.num_threads
                                                                   : NumAvailableCpus());
  ASSIGN_OR_RETURN(auto model, CpuModel::Build(config, weights, max_model_len, *pool,
                                               options.quantize_activations));
  const EngineInfo info{.num_blocks = options.num_blocks,
                        .num_dp_ranks = 1,
                        .max_step_tokens = options.max_step_tokens,
                        .max_sequences = options.max_sequences,
                        .max_model_len = max_model_len,
                        .vocab_size = config.vocab_size};
  auto engine = std::make_unique<CpuEngineImpl>(std::move(pool), std::move(model), info);
  if (!engine->ok()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no address space for a KV cache of ", options.num_blocks, " blocks"));
  }
  return engine;
}

}  // namespace latentd
