#include "scheduler/scheduler.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

absl::Status CheckTokens(const std::vector<TokenId>& tokens, absl::string_view field,
                         int32_t vocab_size) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrCat(field, "[", i, "] is token ", tokens[i],
                                                     "; the vocabulary has ", vocab_size));
    }
  }
  return absl::OkStatus();
}

// Why a sequence ends with `token`, its latest.
FinishReason FinishWith(const Sequence& sequence, TokenId token) {
  const std::vector<TokenId>& stops = sequence.request().stop_token_ids;
  if (std::find(stops.begin(), stops.end(), token) != stops.end()) return FinishReason::kStop;
  if (sequence.num_new_tokens() == sequence.request().max_new_tokens) return FinishReason::kLength;
  return FinishReason::kNone;
}

// `suspect`: a step failed with it in its plan.
SequenceEvent FailedEvent(RequestId id, const absl::Status& error, bool suspect) {
  return {.id = id,
          .kind = SequenceEvent::Kind::kFailed,
          .finish = FinishReason::kError,
          .error = error,
          .suspect = suspect};
}

SequenceEvent TokenEvent(RequestId id, TokenId token, FinishReason finish) {
  return {.id = id, .kind = SequenceEvent::Kind::kToken, .token = token, .finish = finish};
}

}  // namespace

absl::Status CheckRequest(const Request& request, const EngineInfo& engine, int32_t block_size) {
  if (request.prompt.empty()) return absl::InvalidArgumentError("prompt has no tokens");
  if (request.max_new_tokens < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("max_new_tokens is ", request.max_new_tokens, "; it must be 1 or more"));
  }
  if (request.min_new_tokens < 0 || request.min_new_tokens > request.max_new_tokens) {
    return absl::InvalidArgumentError(absl::StrCat("min_new_tokens is ", request.min_new_tokens,
                                                   "; it must be from 0 to max_new_tokens, ",
                                                   request.max_new_tokens));
  }
  const int64_t num_tokens = static_cast<int64_t>(request.prompt.size()) + request.max_new_tokens;
  const std::string sum = absl::StrCat("prompt has ", request.prompt.size(),
                                       " tokens and max_new_tokens is ", request.max_new_tokens);
  if (num_tokens > engine.max_model_len) {
    return absl::InvalidArgumentError(
        absl::StrCat(sum, ", together ", num_tokens, "; the model accepts ", engine.max_model_len));
  }
  // The last token is drawn but never computed, so it needs no place in the cache.
  const int64_t capacity = static_cast<int64_t>(engine.num_blocks) * block_size;
  if (num_tokens - 1 > capacity) {
    return absl::InvalidArgumentError(
        absl::StrCat(sum, ", together ", num_tokens, "; the KV cache of a rank has room for ",
                     capacity, " (", engine.num_blocks, " blocks of ", block_size, ")"));
  }
  RETURN_IF_ERROR(CheckTokens(request.prompt, "prompt", engine.vocab_size));
  return CheckTokens(request.stop_token_ids, "stop_token_ids", engine.vocab_size);
}

Scheduler::Scheduler(const SchedulerConfig& config, const EngineInfo& engine, BlockOptions options)
    : config_(config),
      engine_(engine),
      options_(options),
      max_step_tokens_(std::min(config.max_step_tokens, engine.max_step_tokens)),
      max_running_(std::min(config.max_running, engine.max_sequences)) {
  LATENTD_CHECK(max_step_tokens_ > 0 && max_running_ > 0 && engine.num_dp_ranks > 0);
  for (int32_t rank = 0; rank < engine.num_dp_ranks; ++rank) {
    ranks_.emplace_back(engine.num_blocks, options.block_size);
  }
}

absl::Status Scheduler::Add(Request request) {
  RETURN_IF_ERROR(CheckRequest(request, engine_, options_.block_size));
  int32_t& num_not_started = num_not_started_[request.background];
  if (num_not_started >= config_.max_waiting) {
    return absl::ResourceExhaustedError(absl::StrCat(
        num_not_started, " requests are waiting; max_waiting is ", config_.max_waiting));
  }
  std::unique_ptr<Sequence>& slot = sequences_[request.id];
  if (slot != nullptr) {
    return absl::AlreadyExistsError(absl::StrCat("request id ", request.id, " is in use"));
  }
  slot = std::make_unique<Sequence>(std::move(request), next_arrival_++, options_.block_size,
                                    options_.hash);
  waiting_.emplace(KeyOf(*slot), slot.get());
  ++num_not_started;
  num_background_ += slot->background();
  return absl::OkStatus();
}

void Scheduler::Cancel(RequestId id) {
  const auto it = sequences_.find(id);
  if (it == sequences_.end()) return;
  Sequence* sequence = it->second.get();
  if (sequence->scheduled) {
    sequence->cancelled = true;  // until the step is over
  } else {
    Forget({&sequence, 1});
  }
}

absl::Status Scheduler::CheckResult(const StepPlan& plan, const StepResult& result) const {
  const auto num_samples =
      std::count_if(plan.sequences.begin(), plan.sequences.end(),
                    [](const SequenceStep& sequence) { return sequence.sample; });
  if (static_cast<int64_t>(result.sampled.size()) != num_samples) {
    return absl::InternalError(absl::StrCat("step ", plan.step, ": the engine returned ",
                                            result.sampled.size(), " tokens for ", num_samples,
                                            " sequences"));
  }
  for (const TokenId token : result.sampled) {
    if (token < 0 || token >= engine_.vocab_size) {
      return absl::InternalError(absl::StrCat("step ", plan.step, ": the engine drew token ", token,
                                              "; the vocabulary has ", engine_.vocab_size));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<std::vector<SequenceEvent>> Scheduler::Update(const StepPlan& plan,
                                                             const StepResult& result) {
  LATENTD_CHECK(in_step_ && plan.step == next_step_ - 1);
  RETURN_IF_ERROR(CheckResult(plan, result));
  std::vector<SequenceEvent> events;
  events.reserve(result.sampled.size());
  std::vector<Sequence*> ended;
  auto sampled = result.sampled.begin();
  for (const auto& [sequence, num_tokens] : shares_) {
    sequence->scheduled = false;
    BlockPool* cache = config_.prefix_caching ? &ranks_[sequence->dp_rank()].pool : nullptr;
    sequence->Advance(num_tokens, cache);
    const bool drew = sequence->num_computed_tokens() == sequence->num_tokens();
    const TokenId token = drew ? *sampled++ : 0;
    if (sequence->cancelled) {
      ended.push_back(sequence);
    } else if (drew) {
      sequence->AppendToken(token);
      const FinishReason finish = FinishWith(*sequence, token);
      events.push_back(TokenEvent(sequence->id(), token, finish));
      if (finish != FinishReason::kNone) ended.push_back(sequence);
    }
  }
  EndStep();
  Forget(ended);
  return events;
}

std::vector<SequenceEvent> Scheduler::Restart(const StepPlan& plan, const absl::Status& error) {
  LATENTD_CHECK(in_step_ && plan.step == next_step_ - 1);
  const int loss = absl::IsCancelled(error) ? 0 : 1;
  ++num_restarts_;
  std::vector<SequenceEvent> events;
  std::vector<Sequence*> ended;
  for (const Share& share : shares_) share.sequence->scheduled = false;
  for (Sequence* sequence : running_) {
    if (sequence->cancelled) {
      ended.push_back(sequence);
    } else if ((sequence->num_lost += loss) > config_.max_recoveries) {
      events.push_back(FailedEvent(
          sequence->id(),
          absl::UnavailableError(absl::StrCat(
              "the engine lost ", sequence->num_lost, " steps of this request; max_recoveries is ",
              config_.max_recoveries, "; the last one: ", error.message())),
          /*suspect=*/true));
      ended.push_back(sequence);
    }
  }
  EndStep();
  Forget(ended);
  num_recovered_ += num_running();
  SuspendAll();
  return events;
}

std::vector<SequenceEvent> Scheduler::Abort(const StepPlan& plan, const absl::Status& error) {
  LATENTD_CHECK(in_step_ && plan.step == next_step_ - 1);
  std::vector<SequenceEvent> events;
  std::vector<Sequence*> ended;
  for (const Share& share : shares_) {
    share.sequence->scheduled = false;
    if (!share.sequence->cancelled) {
      events.push_back(FailedEvent(share.sequence->id(), error, /*suspect=*/true));
    }
    ended.push_back(share.sequence);
  }
  EndStep();
  Forget(ended);
  SuspendAll();
  return events;
}

std::vector<SequenceEvent> Scheduler::FailAll(const absl::Status& error) {
  LATENTD_CHECK(!in_step_);
  std::vector<Sequence*> all = running_;
  for (const auto& [key, sequence] : waiting_) all.push_back(sequence);
  std::vector<SequenceEvent> events;
  for (const Sequence* sequence : all) {
    events.push_back(FailedEvent(sequence->id(), error, /*suspect=*/false));
  }
  Forget(all);
  return events;
}

void Scheduler::Suspend(Sequence* sequence) {
  sequence->Restart();
  sequence->running = false;
  --ranks_[sequence->dp_rank()].num_running;
  ranks_[sequence->dp_rank()].num_background -= sequence->background();
  waiting_.emplace(KeyOf(*sequence), sequence);
}

void Scheduler::SuspendAll() {
  for (Sequence* sequence : running_) Suspend(sequence);
  running_.clear();
  for (Rank& rank : ranks_) rank.pool.DropCache();
}

void Scheduler::Forget(absl::Span<Sequence* const> sequences) {
  if (sequences.empty()) return;
  for (Sequence* sequence : sequences) {
    if (sequence->running) {
      --ranks_[sequence->dp_rank()].num_running;
      ranks_[sequence->dp_rank()].num_background -= sequence->background();
    } else {
      waiting_.erase(KeyOf(*sequence));
    }
    if (!sequence->started) --num_not_started_[sequence->background()];
    num_background_ -= sequence->background();
    sequence->running = false;
  }
  std::erase_if(running_, [](const Sequence* sequence) { return !sequence->running; });
  for (const Sequence* sequence : sequences) sequences_.erase(sequence->id());
}

void Scheduler::EndStep() {
  shares_.clear();
  in_step_ = false;
}

Scheduler::WaitingKey Scheduler::KeyOf(const Sequence& sequence) {
  return {sequence.background(), -static_cast<int64_t>(sequence.priority()), sequence.arrival()};
}

bool Scheduler::RunsBefore(const Sequence* a, const Sequence* b) {
  return std::pair(a->background(), a->arrival()) < std::pair(b->background(), b->arrival());
}

int32_t Scheduler::num_blocks() const {
  return static_cast<int32_t>(ranks_.size()) * engine_.num_blocks;
}

int32_t Scheduler::num_background_running() const {
  int32_t num_running = 0;
  for (const Rank& rank : ranks_) num_running += rank.num_background;
  return num_running;
}

int32_t Scheduler::num_free_blocks() const {
  int32_t num_free = 0;
  for (const Rank& rank : ranks_) num_free += rank.pool.num_free();
  return num_free;
}

Scheduler::RankLoad Scheduler::load(int32_t dp_rank) const {
  const Rank& rank = ranks_[dp_rank];
  return {.num_running = rank.num_running,
          .num_background = rank.num_background,
          .num_free_blocks = rank.pool.num_free(),
          .num_background_blocks = rank.pool.num_background()};
}

void Scheduler::CheckInvariants() const {
  // A sequence is in exactly one of waiting and running, each in its order.
  LATENTD_CHECK(sequences_.size() == waiting_.size() + running_.size());
  std::array<int32_t, 2> num_not_started = {};
  int32_t num_background = 0;
  for (const auto& [key, sequence] : waiting_) {
    LATENTD_CHECK(!sequence->running && key == KeyOf(*sequence));
    num_not_started[sequence->background()] += sequence->started ? 0 : 1;
    num_background += sequence->background();
  }
  LATENTD_CHECK(num_not_started == num_not_started_);
  for (const int32_t number : num_not_started) LATENTD_CHECK(number <= config_.max_waiting);
  LATENTD_CHECK(num_background == num_background_waiting());
  for (size_t i = 0; i < running_.size(); ++i) {
    LATENTD_CHECK(running_[i]->running && running_[i]->started);
    LATENTD_CHECK(i == 0 || RunsBefore(running_[i - 1], running_[i]));
  }
  std::vector<int32_t> num_running(ranks_.size()), num_background_running(ranks_.size());
  for (const Sequence* sequence : running_) {
    ++num_running[sequence->dp_rank()];
    num_background_running[sequence->dp_rank()] += sequence->background();
  }
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    LATENTD_CHECK(num_running[rank] == ranks_[rank].num_running);
    LATENTD_CHECK(num_background_running[rank] == ranks_[rank].num_background);
    LATENTD_CHECK(num_running[rank] <= max_running_);
  }
  // A table covers what is computed and what the step under way computes, no more.
  std::vector<int32_t> num_scheduled_tokens(ranks_.size());
  for (const auto& [sequence, num_tokens] : shares_) {
    LATENTD_CHECK(in_step_ && sequence->running && sequence->scheduled && num_tokens > 0);
    const int32_t num_covered = sequence->num_computed_tokens() + num_tokens;
    LATENTD_CHECK(num_covered <= sequence->num_tokens());
    LATENTD_CHECK(sequence->BlocksFor(num_covered) == 0);
    LATENTD_CHECK(sequence->table().size() ==
                  (num_covered + options_.block_size - 1) / options_.block_size);
    num_scheduled_tokens[sequence->dp_rank()] += num_tokens;
  }
  for (const int32_t num_tokens : num_scheduled_tokens) {
    LATENTD_CHECK(num_tokens <= max_step_tokens_);
  }
  // The references of a block are the tables that list it; what is still written has one.
  std::vector<std::vector<int32_t>> uses(ranks_.size(), std::vector<int32_t>(engine_.num_blocks));
  std::vector<std::vector<int32_t>> background_uses = uses;
  for (const auto& [id, sequence] : sequences_) {
    sequence->CheckInvariants();
    for (const BlockId block : sequence->table().blocks()) {
      ++uses[sequence->dp_rank()][block];
      background_uses[sequence->dp_rank()][block] += sequence->background();
    }
  }
  for (const Sequence* sequence : running_) {
    const BlockTable& table = sequence->table();
    for (int32_t i = sequence->num_computed_tokens() / options_.block_size; i < table.size(); ++i) {
      LATENTD_CHECK(uses[sequence->dp_rank()][table[i]] == 1);
    }
  }
  for (size_t rank = 0; rank < ranks_.size(); ++rank) {
    ranks_[rank].pool.CheckInvariants();
    for (BlockId block = 0; block < engine_.num_blocks; ++block) {
      LATENTD_CHECK(ranks_[rank].pool.num_references(block) == uses[rank][block]);
      LATENTD_CHECK(ranks_[rank].pool.num_background_references(block) ==
                    background_uses[rank][block]);
    }
  }
}

}  // namespace latentd
