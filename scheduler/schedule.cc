// Scheduler::Schedule(): the policy of README.md.
#include <algorithm>
#include <limits>

#include "absl/container/inlined_vector.h"
#include "engine/status.h"
#include "scheduler/scheduler.h"

namespace latentd {
namespace {

// Ranks whose room is within so small a part of the most room are as good: there a sequence's
// cached prefix, and the step's even load, count for more.
constexpr int32_t kRoomShare = 8;

SequenceEvent StartedEvent(RequestId id, int32_t cached_tokens) {
  return {.id = id, .kind = SequenceEvent::Kind::kStarted, .cached_tokens = cached_tokens};
}

}  // namespace

StepPlan Scheduler::Schedule() {
  LATENTD_CHECK(!in_step_);
  started_.clear();
  num_background_tokens_ = 0;
  for (Rank& rank : ranks_) {
    rank.budget = max_step_tokens_;
    rank.num_tokens = 0;
    rank.preempted = {};
  }
  ContinueRunning(/*background=*/false);
  AdmitWaiting(/*background=*/false);
  CapBackground();
  ContinueRunning(/*background=*/true);
  AdmitWaiting(/*background=*/true);
  return MakePlan();
}

void Scheduler::CapBackground() {
  if (config_.max_background_tokens == 0 || shares_.empty()) return;
  for (Rank& rank : ranks_) rank.budget = std::min(rank.budget, config_.max_background_tokens);
}

void Scheduler::ContinueRunning(bool background) {
  const std::vector<Sequence*> oldest_first = running_;
  for (Sequence* sequence : oldest_first) {
    if (sequence->background() != background) continue;
    if (!sequence->running) continue;  // preempted by an older one
    const int32_t budget = ranks_[sequence->dp_rank()].budget;
    if (budget == 0) continue;
    const int32_t num_computed = sequence->num_computed_tokens();
    const int32_t num_tokens = std::min(sequence->num_tokens() - num_computed, budget);
    if (MakeRoom(sequence, num_computed + num_tokens)) AddShare(sequence, num_tokens);
  }
}

bool Scheduler::MakeRoom(Sequence* sequence, int32_t num_tokens) {
  const BlockPool& pool = ranks_[sequence->dp_rank()].pool;
  const int32_t num_blocks = sequence->BlocksFor(num_tokens);
  while (pool.num_free() < num_blocks) {
    Sequence* victim = FindVictim(sequence->dp_rank());
    Preempt(victim);
    if (victim == sequence) return false;
  }
  return true;
}

Sequence* Scheduler::FindVictim(int32_t dp_rank) const {
  Sequence* victim = nullptr;
  for (Sequence* sequence : running_) {
    if (sequence->dp_rank() != dp_rank) continue;
    if (victim == nullptr || sequence->background() > victim->background() ||
        sequence->priority() <= victim->priority()) {
      victim = sequence;
    }
  }
  return victim;
}

void Scheduler::Preempt(Sequence* sequence) {
  Rank& rank = ranks_[sequence->dp_rank()];
  rank.preempted[sequence->background()] = true;
  // It may have its share of this step already: an older one of lower priority.
  const auto share = std::find_if(shares_.begin(), shares_.end(), [sequence](const Share& share) {
    return share.sequence == sequence;
  });
  if (share != shares_.end()) {
    rank.budget += share->num_tokens;
    rank.num_tokens -= share->num_tokens;
    if (sequence->background()) num_background_tokens_ -= share->num_tokens;
    shares_.erase(share);
  }
  ++num_preemptions_;
  num_background_preemptions_ += sequence->background();
  Suspend(sequence);
  std::erase(running_, sequence);
}

void Scheduler::AdmitWaiting(bool background) {
  constexpr int64_t kFirst = std::numeric_limits<int64_t>::min();
  while (true) {
    const auto next = waiting_.lower_bound({background, kFirst, kFirst});
    if (next == waiting_.end() || next->second->background() != background) return;
    Sequence* sequence = next->second;
    const int32_t rank = ChooseRank(sequence);
    if (rank < 0) return;
    waiting_.erase(next);
    Run(sequence, rank);
    const int32_t num_computed = sequence->num_computed_tokens();
    const int32_t num_tokens = std::min(sequence->num_tokens() - num_computed, ranks_[rank].budget);
    LATENTD_CHECK(MakeRoom(sequence, num_computed + num_tokens));
    AddShare(sequence, num_tokens);
  }
}

int32_t Scheduler::ChooseRank(Sequence* sequence) const {
  struct Choice {
    int32_t rank;
    int32_t room;  // blocks left behind it; a cached block counts as room
    int64_t work;  // tokens that the rank has to compute with it
  };
  absl::InlinedVector<Choice, 32> choices;
  const bool background = sequence->background();
  int32_t most_room = 0;
  const int32_t num_blocks = sequence->BlocksFor(sequence->num_tokens());
  for (int32_t i = 0; i < static_cast<int32_t>(ranks_.size()); ++i) {
    const Rank& rank = ranks_[i];
    // With budget left, every running sequence of this class on the rank, and of the class before
    // it, has its blocks for all the tokens it has: what is free now is spoken for by nobody. After
    // a preemption, whom to admit? The preempted would come right back, or younger ones would take
    // their place.
    if (rank.budget == 0 || rank.preempted[false]) continue;
    if (background && rank.preempted[true]) continue;
    if (rank.num_running - (background ? 0 : rank.num_background) >= max_running_) continue;
    const Sequence::PrefixHit hit = sequence->FindPrefix(rank.pool);
    const int32_t num_free = rank.pool.num_free() + (background ? 0 : rank.pool.num_background());
    const int32_t num_to_compute = num_blocks - hit.num_blocks;
    // Those that run soon need another block each; who is preempted for it was begun for nothing.
    const int32_t num_spared = background ? rank.num_running : 0;
    if (num_to_compute + hit.num_available_blocks + num_spared > num_free) continue;
    const int32_t room = num_free - num_to_compute;
    const int64_t num_cached = int64_t{hit.num_blocks} * options_.block_size;
    const int64_t work = rank.num_tokens + sequence->num_tokens() - num_cached;
    choices.push_back({.rank = i, .room = room, .work = work});
    most_room = std::max(most_room, room);
  }
  const Choice* best = nullptr;
  for (const Choice& choice : choices) {
    if (choice.room < most_room - most_room / kRoomShare) continue;
    if (best == nullptr || choice.work < best->work ||
        (choice.work == best->work && choice.room > best->room)) {
      best = &choice;
    }
  }
  return best == nullptr ? -1 : best->rank;
}

void Scheduler::Run(Sequence* sequence, int32_t rank) {
  if (ranks_[rank].num_running >= max_running_) Preempt(FindVictim(rank));
  sequence->TakePrefix(&ranks_[rank].pool, rank);
  sequence->running = true;
  ++ranks_[rank].num_running;
  ranks_[rank].num_background += sequence->background();
  running_.insert(std::upper_bound(running_.begin(), running_.end(), sequence, RunsBefore),
                  sequence);
  if (sequence->started) return;
  sequence->started = true;
  --num_not_started_[sequence->background()];
  prompt_tokens_ += sequence->num_prompt_tokens();
  cached_tokens_ += sequence->num_computed_tokens();
  started_.push_back(StartedEvent(sequence->id(), sequence->num_computed_tokens()));
}

void Scheduler::AddShare(Sequence* sequence, int32_t num_tokens) {
  Rank& rank = ranks_[sequence->dp_rank()];
  sequence->Reserve(&rank.pool, sequence->num_computed_tokens() + num_tokens);
  shares_.push_back({sequence, num_tokens});
  rank.budget -= num_tokens;
  rank.num_tokens += num_tokens;
  if (sequence->background()) num_background_tokens_ += num_tokens;
}

StepPlan Scheduler::MakePlan() {
  StepPlan plan;
  if (shares_.empty()) return plan;
  in_step_ = true;
  plan.step = next_step_++;
  size_t num_tokens = 0;
  size_t num_blocks = 0;
  for (const Share& share : shares_) {
    num_tokens += share.num_tokens;
    num_blocks += share.sequence->table().size();
  }
  plan.sequences.reserve(shares_.size());
  plan.tokens.reserve(num_tokens);
  plan.blocks.reserve(num_blocks);
  for (const auto& [sequence, num_tokens] : shares_) {
    sequence->scheduled = true;
    const Request& request = sequence->request();
    const int32_t num_computed = sequence->num_computed_tokens();
    const bool sample = num_computed + num_tokens == sequence->num_tokens();
    const bool suppress = sample && sequence->num_new_tokens() < request.min_new_tokens;
    plan.sequences.push_back({
        .id = sequence->id(),
        .dp_rank = sequence->dp_rank(),
        .num_computed_tokens = num_computed,
        .num_tokens = num_tokens,
        .num_blocks = sequence->table().size(),
        .num_suppressed = suppress ? static_cast<int32_t>(request.stop_token_ids.size()) : 0,
        .sample = sample,
        .sampling = request.sampling,
    });
    const absl::Span<const TokenId> tokens = sequence->tokens().subspan(num_computed, num_tokens);
    const absl::Span<const BlockId> blocks = sequence->table().blocks();
    plan.tokens.insert(plan.tokens.end(), tokens.begin(), tokens.end());
    plan.blocks.insert(plan.blocks.end(), blocks.begin(), blocks.end());
    if (suppress) {
      plan.suppressed.insert(plan.suppressed.end(), request.stop_token_ids.begin(),
                             request.stop_token_ids.end());
    }
  }
  return plan;
}

}  // namespace latentd
