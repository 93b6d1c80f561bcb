#include "engine/plan_check.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

template <typename... Args>
absl::Status Invalid(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat("plan: ", args...));
}

}  // namespace

absl::Status PlanCheck::Check(const StepPlan& plan) {
  RETURN_IF_ERROR(CheckSizes(plan));
  RETURN_IF_ERROR(CheckIds(plan));
  return CheckWrites(plan);
}

absl::Status PlanCheck::CheckSizes(const StepPlan& plan) const {
  if (plan.sequences.size() > static_cast<size_t>(info_.max_sequences)) {
    return Invalid(plan.sequences.size(), " sequences; the limit is ", info_.max_sequences);
  }
  if (plan.tokens.size() > static_cast<size_t>(info_.max_step_tokens)) {
    return Invalid(plan.tokens.size(), " tokens; the limit is ", info_.max_step_tokens);
  }
  int64_t tokens = 0, blocks = 0, suppressed = 0;
  for (const SequenceStep& s : plan.sequences) {
    RETURN_IF_ERROR(CheckSequence(s));
    tokens += s.num_tokens;
    blocks += s.num_blocks;
    suppressed += s.num_suppressed;
  }
  if (tokens != static_cast<int64_t>(plan.tokens.size())) {
    return Invalid("tokens has ", plan.tokens.size(), " elements; the sequences have ", tokens);
  }
  if (blocks != static_cast<int64_t>(plan.blocks.size())) {
    return Invalid("blocks has ", plan.blocks.size(), " elements; the sequences have ", blocks);
  }
  if (suppressed != static_cast<int64_t>(plan.suppressed.size())) {
    return Invalid("suppressed has ", plan.suppressed.size(), " elements; the sequences have ",
                   suppressed);
  }
  return absl::OkStatus();
}

absl::Status PlanCheck::CheckSequence(const SequenceStep& s) const {
  if (s.dp_rank != dp_rank_) {
    return Invalid("sequence ", s.id, ": dp_rank ", s.dp_rank, "; only ", dp_rank_, " is here");
  }
  if (s.num_tokens < 1) return Invalid("sequence ", s.id, ": num_tokens ", s.num_tokens);
  if (s.num_computed_tokens < 0) {
    return Invalid("sequence ", s.id, ": num_computed_tokens ", s.num_computed_tokens);
  }
  if (s.num_suppressed < 0) {
    return Invalid("sequence ", s.id, ": num_suppressed ", s.num_suppressed);
  }
  const int64_t length = int64_t{s.num_computed_tokens} + s.num_tokens;
  if (length > info_.max_model_len) {
    return Invalid("sequence ", s.id, ": ", length, " tokens; the limit is ", info_.max_model_len);
  }
  if (s.num_blocks != (length + kBlockSize - 1) / kBlockSize) {
    return Invalid("sequence ", s.id, ": num_blocks ", s.num_blocks, " for ", length, " tokens");
  }
  const SamplingParams& p = s.sampling;
  if (!s.sample) return absl::OkStatus();
  if (!(p.temperature >= 0.0f && std::isfinite(p.temperature)) ||
      !(p.top_p > 0.0f && p.top_p <= 1.0f) || p.top_k < 0 ||
      !(p.min_p >= 0.0f && p.min_p <= 1.0f)) {
    return Invalid("sequence ", s.id, ": temperature ", p.temperature, ", top_p ", p.top_p,
                   ", top_k ", p.top_k, ", min_p ", p.min_p, " are out of range");
  }
  return absl::OkStatus();
}

absl::Status PlanCheck::CheckIds(const StepPlan& plan) const {
  for (TokenId token : plan.tokens) {
    if (token < 0 || token >= info_.vocab_size) {
      return Invalid("token ", token, "; the vocabulary has ", info_.vocab_size);
    }
  }
  for (TokenId token : plan.suppressed) {
    if (token < 0 || token >= info_.vocab_size) {
      return Invalid("suppressed token ", token, "; the vocabulary has ", info_.vocab_size);
    }
  }
  for (BlockId block : plan.blocks) {
    if (block < 0 || block >= info_.num_blocks) {
      return Invalid("block ", block, "; the cache has ", info_.num_blocks);
    }
  }
  return absl::OkStatus();
}

// A block that is written in this step belongs to one place of one table.
absl::Status PlanCheck::CheckWrites(const StepPlan& plan) {
  absl::Status status;
  const BlockId* blocks = plan.blocks.data();
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequenceStep& s = plan.sequences[i];
    for (int b = s.num_computed_tokens / kBlockSize; b < s.num_blocks; ++b) {
      if (writer_[blocks[b]] != kNobody && status.ok()) {
        status = Invalid("sequence ", s.id, " and sequence ", plan.sequences[writer_[blocks[b]]].id,
                         " both write block ", blocks[b]);
      }
      writer_[blocks[b]] = static_cast<int32_t>(i);
    }
    blocks += s.num_blocks;
  }
  blocks = plan.blocks.data();
  for (size_t i = 0; i < plan.sequences.size(); ++i) {
    const SequenceStep& s = plan.sequences[i];
    for (int b = 0; b < s.num_computed_tokens / kBlockSize; ++b) {
      if (writer_[blocks[b]] != kNobody && status.ok()) {
        status = Invalid("sequence ", s.id, " reads block ", blocks[b], ", which sequence ",
                         plan.sequences[writer_[blocks[b]]].id, " writes");
      }
    }
    blocks += s.num_blocks;
  }
  for (BlockId block : plan.blocks) writer_[block] = kNobody;
  return status;
}

}  // namespace latentd
