#include "engine/cpu/cpu_engine.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/attention.h"
#include "engine/cpu/cpu_model.h"
#include "engine/cpu/expert_exchange.h"
#include "engine/cpu/forward.h"
#include "engine/cpu/group_link.h"
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

absl::Status CheckPlacement(const Placement& placement, bool in_group) {
  RETURN_IF_ERROR(CheckOption("placement.world_size", placement.world_size, 1));
  RETURN_IF_ERROR(CheckOption("placement.rank", placement.rank, 0));
  if (placement.rank >= placement.world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("placement.rank: ", placement.rank, " of ", placement.world_size));
  }
  if (placement.world_size > 1 && !in_group) {
    return absl::InvalidArgumentError("placement: a rank of a group needs a transport");
  }
  return absl::OkStatus();
}

absl::Status CheckMemory(const ModelConfig& config, const ModelWeights& weights,
                         const CpuEngineOptions& options, int32_t max_model_len) {
  const uint64_t packed = CpuModel::NumBytes(config, weights, max_model_len, options.placement);
  const uint64_t cache = LatentCache::NumBytes(config, options.num_blocks);
  const uint64_t activations =
      Forward::NumBytes(config, options.max_step_tokens, options.placement) +
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
                const EngineInfo& info, const CpuEngineOptions& options,
                std::unique_ptr<GroupTransport> transport)
      : info_(info),
        pool_(std::move(pool)),
        model_(std::move(model)),
        cache_(model_->config, info.num_blocks, options.quantize_cache),
        forward_(*model_, *SupportedKernels().front(), *pool_, cache_, info.max_step_tokens),
        plan_check_(info, options.placement.rank),
        logits_(size_t{kLogitRows} * info.vocab_size),
        samplers_(pool_->num_threads()) {
    if (transport != nullptr) {
      link_ = std::make_unique<GroupLink>(options.placement, std::move(transport));
    }
  }

  bool ok() const { return cache_.ok(); }
  EngineInfo info() const override { return info_; }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    if (link_ != nullptr) return ExecuteShare(plan);
    RETURN_IF_ERROR(plan_check_.Check(plan));
    if (plan.empty()) return StepResult();
    RETURN_IF_ERROR(forward_.Run(plan));
    return SampleAll(plan);
  }

  absl::Status Join(const GroupSpec& group, absl::Time deadline) override {
    if (link_ == nullptr) return NoGroup();
    exchange_.reset();
    RETURN_IF_ERROR(link_->Join(group, deadline));
    ASSIGN_OR_RETURN(Communicator * communicator, link_->communicator());
    if (group.world_size > 1) {
      exchange_ = std::make_unique<ExpertExchange>(model_->config, *pool_, *communicator);
    }
    return absl::OkStatus();
  }
  void AbortGroup(const absl::Status& why) override {
    if (link_ != nullptr) link_->Abort(why);
  }
  std::string waiting_in() const override { return link_ != nullptr ? link_->waiting_in() : ""; }
  std::string transport() const override { return link_ != nullptr ? link_->transport() : ""; }
  std::string address() const override { return link_ != nullptr ? link_->address() : ""; }

 private:
  static absl::Status NoGroup() {
    return absl::FailedPreconditionError("this CPU engine was made to be alone");
  }

  absl::StatusOr<StepResult> ExecuteShare(const StepPlan& plan) {
    RETURN_IF_ERROR(link_->communicator().status());
    if (absl::Status status = CheckShape(plan); !status.ok()) {
      link_->Fail(status);
      return status;
    }
    const absl::Status refused = plan_check_.Check(plan);
    StepPlan nothing;
    nothing.step = plan.step;
    nothing.shape = plan.shape;
    const absl::Status status = forward_.Run(refused.ok() ? plan : nothing, exchange_.get());
    if (!status.ok()) link_->Fail(status);
    RETURN_IF_ERROR(status);
    RETURN_IF_ERROR(refused);
    return SampleAll(plan);
  }

  // Whether this rank knows from the plan what the others do in its step.
  absl::Status CheckShape(const StepPlan& plan) const {
    const int64_t num_tokens = static_cast<int64_t>(plan.tokens.size());
    if (plan.shape.num_tokens >= num_tokens && plan.shape.num_tokens <= info_.max_step_tokens) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat("plan: shape.num_tokens ", plan.shape.num_tokens,
                                                   " for ", num_tokens, " tokens; the limit is ",
                                                   info_.max_step_tokens));
  }

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
  AlignedVector<float> logits_;      // [kLogitRows, vocab_size]
  std::vector<Sampler> samplers_;    // [threads]
  std::unique_ptr<GroupLink> link_;  // null: alone
  std::unique_ptr<ExpertExchange>
      exchange_;  // of the group of now; null where all experts are here
};

}  // namespace

absl::StatusOr<std::unique_ptr<CpuEngine>> CpuEngine::Create(
    const ModelConfig& config, const ModelWeights& weights, const CpuEngineOptions& options,
    std::unique_ptr<GroupTransport> transport) {
  RETURN_IF_ERROR(CheckOption("num_threads", options.num_threads, 0));
  RETURN_IF_ERROR(CheckOption("num_blocks", options.num_blocks, 1));
  RETURN_IF_ERROR(CheckOption("max_step_tokens", options.max_step_tokens, 1));
  RETURN_IF_ERROR(CheckOption("max_sequences", options.max_sequences, 1));
  RETURN_IF_ERROR(CheckOption("max_model_len", options.max_model_len, 0));
  RETURN_IF_ERROR(CheckPlacement(options.placement, transport != nullptr));
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
                                               options.quantize_activations, options.placement));
  const EngineInfo info{.num_blocks = options.num_blocks,
                        .num_dp_ranks = 1,
                        .max_step_tokens = options.max_step_tokens,
                        .max_sequences = options.max_sequences,
                        .max_model_len = max_model_len,
                        .vocab_size = config.vocab_size};
  auto engine = std::make_unique<CpuEngineImpl>(std::move(pool), std::move(model), info, options,
                                                std::move(transport));
  if (!engine->ok()) {
    return absl::ResourceExhaustedError(
        absl::StrCat("no address space for a KV cache of ", options.num_blocks, " blocks"));
  }
  return engine;
}

}  // namespace latentd
