#include "engine/plan_split.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace latentd {

absl::Status CheckSplit(const StepPlan& plan, int32_t num_ranks) {
  int64_t tokens = 0, blocks = 0, suppressed = 0;
  for (const SequenceStep& sequence : plan.sequences) {
    const bool counts =
        sequence.num_tokens >= 0 && sequence.num_blocks >= 0 && sequence.num_suppressed >= 0;
    if (!counts || sequence.dp_rank < 0 || sequence.dp_rank >= num_ranks) {
      return absl::InvalidArgumentError(
          absl::StrCat("plan: sequence ", sequence.id, ": num_tokens ", sequence.num_tokens,
                       ", num_blocks ", sequence.num_blocks, ", num_suppressed ",
                       sequence.num_suppressed, ", dp_rank ", sequence.dp_rank, " of ", num_ranks));
    }
    tokens += sequence.num_tokens;
    blocks += sequence.num_blocks;
    suppressed += sequence.num_suppressed;
  }
  if (tokens == static_cast<int64_t>(plan.tokens.size()) &&
      blocks == static_cast<int64_t>(plan.blocks.size()) &&
      suppressed == static_cast<int64_t>(plan.suppressed.size())) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(
      absl::StrCat("plan: ", plan.tokens.size(), " tokens, ", plan.blocks.size(), " blocks, ",
                   plan.suppressed.size(), " suppressed; the sequences have ", tokens, ", ", blocks,
                   ", ", suppressed));
}

void SplitPlan(const StepPlan& plan, int32_t num_ranks, std::vector<StepPlan>* shares) {
  shares->resize(num_ranks);
  for (StepPlan& share : *shares) {
    share.step = plan.step;
    share.sequences.clear();
    share.tokens.clear();
    share.blocks.clear();
    share.suppressed.clear();
  }
  GroupShape shape{.decode = !plan.empty()};
  const TokenId* tokens = plan.tokens.data();
  const BlockId* blocks = plan.blocks.data();
  const TokenId* suppressed = plan.suppressed.data();
  for (const SequenceStep& sequence : plan.sequences) {
    StepPlan& share = (*shares)[sequence.dp_rank];
    share.sequences.push_back(sequence);
    share.tokens.insert(share.tokens.end(), tokens, tokens + sequence.num_tokens);
    share.blocks.insert(share.blocks.end(), blocks, blocks + sequence.num_blocks);
    share.suppressed.insert(share.suppressed.end(), suppressed,
                            suppressed + sequence.num_suppressed);
    tokens += sequence.num_tokens;
    blocks += sequence.num_blocks;
    suppressed += sequence.num_suppressed;
    shape.decode = shape.decode && sequence.num_tokens == 1 && sequence.sample;
  }
  for (const StepPlan& share : *shares) {
    shape.num_tokens = std::max(shape.num_tokens, static_cast<int32_t>(share.tokens.size()));
    shape.num_sequences =
        std::max(shape.num_sequences, static_cast<int32_t>(share.sequences.size()));
  }
  for (StepPlan& share : *shares) share.shape = shape;
}

absl::StatusOr<StepResult> MergeResults(const StepPlan& plan,
                                        absl::Span<const StepResult> results) {
  std::vector<size_t> next(results.size());
  StepResult merged;
  for (const SequenceStep& sequence : plan.sequences) {
    if (!sequence.sample) continue;
    const std::vector<TokenId>& sampled = results[sequence.dp_rank].sampled;
    size_t& i = next[sequence.dp_rank];
    // A rank with too few tokens is named below.
    if (i < sampled.size()) merged.sampled.push_back(sampled[i]);
    ++i;
  }
  for (size_t rank = 0; rank < results.size(); ++rank) {
    if (results[rank].sampled.size() != next[rank]) {
      return absl::InternalError(absl::StrCat("rank ", rank, ": step ", plan.step, ": ",
                                              results[rank].sampled.size(), " tokens for ",
                                              next[rank], " sequences"));
    }
    const std::optional<DeviceTimes>& times = results[rank].device;
    if (times && (!merged.device || times->busy_seconds > merged.device->busy_seconds)) {
      merged.device = times;
    }
  }
  return merged;
}

}  // namespace latentd
