#include "tests/scheduler/random_steps.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "scheduler/scheduler.h"
#include "tests/scheduler/fake_engine.h"
#include "tests/scheduler/shadow_scheduler.h"

namespace latentd {
namespace {

// Few values, so that most blocks collide: the cache must not trust its hash.
BlockHash WeakHash(const BlockHash& parent, absl::Span<const TokenId> tokens) {
  BlockHash weak;
  weak.bytes[0] = HashBlock(parent, tokens).bytes[0] % 3;
  return weak;
}

// One scheduler, its engine, and all that a client knows of its requests.
class World {
 public:
  World(uint64_t seed, RandomStepsReport* report) : seed_(seed), random_(seed), report_(report) {
    MakeShape();
    for (int i = 0; i < 4; ++i) phrases_.push_back(RandomTokens(block_size_));
  }

  // Requests come for `num_steps` steps; then the rest runs to its end.
  void Run(int64_t num_steps) {
    for (int64_t i = 0; i < num_steps; ++i) {
      if (OneIn(2)) SubmitOne();
      if (OneIn(40)) CancelOne();
      Step();
    }
    for (int64_t limit = step_ + 100'000; !scheduler_->idle(); Step()) {
      Check(step_ < limit, "requests do not come to an end");
    }
    Check(open_.empty(), "a request without an end");
    Check(scheduler_->num_free_blocks() == scheduler_->num_blocks(), "a block was not given back");
    for (const bool background : {false, true}) {
      Check(scheduler_->num_not_started(background) == 0,
            "a request counts as waiting and is gone");
    }
    ++report_->num_worlds;
    report_->num_preemptions += scheduler_->num_preemptions();
    report_->num_cached_tokens += scheduler_->cached_tokens();
    report_->num_recovered += scheduler_->num_recovered();
  }

 private:
  struct Client {
    Request request;
    std::vector<TokenId> expected;
    std::vector<TokenId> got;
    int64_t arrival = 0;
    bool started = false;
    int32_t rank = -1;             // in the latest plan that had it
    int32_t num_blocks = 0;        // its table there
    int64_t num_preemptions = 0;   // of all, when that plan was made
    int num_lost_steps_since = 0;  // since it started
    int num_lost_steps = 0;        // of those, that computed it
  };

  // What a rank has, and gave in the step so far.
  struct Load {
    int32_t running = 0;
    int32_t background = 0;         // of those
    int32_t free = 0;               // blocks
    int32_t background_blocks = 0;  // that background sequences hold
    int32_t budget = 0;             // tokens
    int32_t tokens = 0;
  };

  int Pick(int low, int high) { return low + static_cast<int>(random_() % (high - low + 1)); }
  bool OneIn(int n) { return Pick(1, n) == 1; }

  void Check(bool holds, const std::string& what) const {
    if (holds) return;
    std::fprintf(stderr, "world %llu, step %lld: check failed: %s\n",
                 static_cast<unsigned long long>(seed_), static_cast<long long>(step_),
                 what.c_str());
    std::abort();
  }

  void MakeShape() {
    block_size_ = Pick(1, 5);
    FakeEngineOptions options;
    options.block_size = block_size_;
    options.info = {.num_blocks = Pick(3, 20),
                    .num_dp_ranks = Pick(1, 3),
                    .max_step_tokens = Pick(1, 24),
                    .max_sequences = Pick(1, 10),
                    .max_model_len = Pick(20, 60),
                    .vocab_size = Pick(4, 7)};
    options.failure_probability = OneIn(3) ? 0.02 : 0;
    options.abort_probability = OneIn(3) ? 0.04 : 0;
    options.failure_seed = seed_;
    engine_ = std::make_unique<FakeEngine>(options);
    config_ = {.max_step_tokens = Pick(1, 24),
               .max_running = Pick(1, 10),
               .max_waiting = Pick(1, 12),
               .prefix_caching = !OneIn(3),
               .max_recoveries = Pick(0, 3),
               .max_background_tokens = OneIn(2) ? 0 : Pick(1, 12)};
    max_priority_ = OneIn(2) ? 0 : 2;
    num_salts_ = OneIn(2) ? 1 : 3;
    has_background_ = OneIn(2);
    const Scheduler::BlockOptions blocks = {.block_size = block_size_,
                                            .hash = OneIn(3) ? WeakHash : HashBlock};
    scheduler_ = std::make_unique<Scheduler>(config_, options.info, blocks);
    const bool fails = options.failure_probability > 0 || options.abort_probability > 0;
    if (has_background_ && !config_.prefix_caching && !fails) {
      shadow_ = std::make_unique<ShadowScheduler>(config_, options, blocks);
    }
  }

  std::vector<TokenId> RandomTokens(int count) {
    std::vector<TokenId> tokens(count);
    for (TokenId& token : tokens) token = Pick(0, engine_->info().vocab_size - 1);
    return tokens;
  }

  // Blocks that repeat, behind different prefixes too; and conversations that go on.
  std::vector<TokenId> RandomPrompt() {
    std::vector<TokenId> prompt;
    if (!answered_.empty() && OneIn(3)) {
      prompt = answered_[Pick(0, static_cast<int>(answered_.size()) - 1)];
    } else {
      for (int i = Pick(0, 5); i > 0; --i) {
        const std::vector<TokenId>& phrase = phrases_[Pick(0, 3)];
        prompt.insert(prompt.end(), phrase.begin(), phrase.end());
      }
    }
    if (prompt.empty() || OneIn(2)) {
      const std::vector<TokenId> tail = RandomTokens(Pick(1, 6));
      prompt.insert(prompt.end(), tail.begin(), tail.end());
    }
    return prompt;
  }

  void SubmitOne() {
    Request request;
    request.id = next_id_++;
    request.prompt = RandomPrompt();
    request.max_new_tokens = Pick(1, 16);
    if (OneIn(3)) request.min_new_tokens = Pick(1, request.max_new_tokens);
    for (int i = Pick(0, 2); i > 0; --i) {
      request.stop_token_ids.push_back(Pick(0, engine_->info().vocab_size - 1));
    }
    request.priority = Pick(0, max_priority_);
    request.background = has_background_ && OneIn(2);
    request.cache_salt = std::string(Pick(0, num_salts_ - 1), 's');
    request.sampling.seed = random_();
    request.sampling.temperature = static_cast<float>(Pick(0, 4)) / 2;

    const bool fits = CheckRequest(request, engine_->info(), block_size_).ok();
    const bool has_room = NumNotStarted(request.background) < config_.max_waiting;
    const absl::Status added = scheduler_->Add(request);
    Check(added.ok() == (fits && has_room), absl::StrCat("Add: ", added.ToString()));
    if (!added.ok()) {
      Check(fits == absl::IsResourceExhausted(added), absl::StrCat("Add: ", added.ToString()));
      ++report_->num_refused;
      return;
    }
    if (shadow_ != nullptr) shadow_->Add(request);
    Client& client = open_[request.id];
    client.expected = engine_->Expected(request);
    client.arrival = next_arrival_++;
    client.request = std::move(request);
  }

  void CancelOne() {
    if (open_.empty()) return;
    const auto it = std::next(open_.begin(), Pick(0, static_cast<int>(open_.size()) - 1));
    scheduler_->Cancel(it->first);
    if (shadow_ != nullptr) shadow_->Cancel(it->first);
    open_.erase(it);
    ++report_->num_cancelled;
  }

  void Step() {
    ++step_;
    scheduler_->CheckInvariants();
    NoteLoads();
    const StepPlan plan = scheduler_->Schedule();
    scheduler_->CheckInvariants();
    CheckStarted();
    if (shadow_ != nullptr) {
      Check(shadow_->SchedulesAs(plan), "a background request changes what the others get");
      ++report_->num_shadow_steps;
    }
    if (plan.empty()) {
      Check(scheduler_->idle(), "an empty plan while requests wait");
      return;
    }
    CheckPlan(plan);
    CheckRanks(plan);
    NoteComputed(plan);
    if (OneIn(30)) CancelInStep(plan);
    const absl::StatusOr<StepResult> result = engine_->Execute(plan);
    if (absl::IsAborted(result.status())) {
      CheckRestart(plan, scheduler_->Restart(plan, result.status()));
      ++report_->num_lost_steps;
    } else if (!result.ok()) {
      Check(absl::IsUnavailable(result.status()), result.status().ToString());
      CheckFailures(plan, scheduler_->Abort(plan, result.status()));
      ++report_->num_failed_steps;
    } else {
      const auto events = scheduler_->Update(plan, *result);
      Check(events.ok(), "Update refuses a result");
      Check(events->size() <= result->sampled.size(), "more events than tokens");
      for (const SequenceEvent& event : *events) TakeToken(event);
    }
    if (shadow_ != nullptr) shadow_->EndStep();
    scheduler_->CheckInvariants();
    Check(
        scheduler_->num_running() + scheduler_->num_waiting() == static_cast<int32_t>(open_.size()),
        "the scheduler has other requests than the clients");
    ++report_->num_steps;
  }

  void CheckPlan(const StepPlan& plan) {
    Check(plan.step == next_step_++, "steps are not counted one by one");
    const absl::Status valid = engine_->CheckPlan(plan);
    Check(valid.ok(), valid.ToString());
    const int32_t num_ranks = engine_->info().num_dp_ranks;
    struct Use {
      int32_t num_tokens = 0;
      int32_t num_sequences = 0;
    };
    std::vector<Use> all(num_ranks), background(num_ranks);
    for (const SequenceStep& sequence : plan.sequences) {
      Check(open_.contains(sequence.id), "a sequence in the plan that nobody wants");
      const bool is_background = IsBackground(sequence);
      Check(is_background || !IsBackground(plan.sequences.front()), "background goes first");
      for (std::vector<Use>* uses : {&all, is_background ? &background : nullptr}) {
        if (uses == nullptr) continue;
        (*uses)[sequence.dp_rank].num_tokens += sequence.num_tokens;
        ++(*uses)[sequence.dp_rank].num_sequences;
      }
    }
    const int32_t cap = BackgroundCap(plan);
    int32_t num_background_tokens = 0;
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      const Scheduler::RankLoad load = scheduler_->load(rank);
      Check(all[rank].num_tokens <= config_.max_step_tokens, "over the budget");
      Check(all[rank].num_sequences <= config_.max_running, "over max_running");
      Check(background[rank].num_tokens <= cap, "over max_background_tokens");
      const bool spent = all[rank].num_tokens == Budget();
      Check(spent || all[rank].num_sequences - background[rank].num_sequences ==
                         load.num_running - load.num_background,
            "a running sequence gets nothing of what is left of its rank's budget");
      Check(spent || background[rank].num_tokens == cap ||
                background[rank].num_sequences == load.num_background,
            "a background sequence gets nothing of what is left of its rank's budget");
      num_background_tokens += background[rank].num_tokens;
    }
    Check(num_background_tokens == scheduler_->num_background_tokens(), "background is miscounted");
  }

  bool IsBackground(const SequenceStep& sequence) const {
    return open_.at(sequence.id).request.background;
  }

  // What background sequences of a rank may have in this step.
  int32_t BackgroundCap(const StepPlan& plan) const {
    const bool alone = plan.sequences.empty() || IsBackground(plan.sequences.front());
    return config_.max_background_tokens == 0 || alone ? Budget() : config_.max_background_tokens;
  }

  int32_t Budget() const {
    return std::min(config_.max_step_tokens, engine_->info().max_step_tokens);
  }

  // What the ranks have before a step, for CheckRanks().
  void NoteLoads() {
    loads_.clear();
    for (int32_t rank = 0; rank < engine_->info().num_dp_ranks; ++rank) {
      const Scheduler::RankLoad load = scheduler_->load(rank);
      loads_.push_back({.running = load.num_running,
                        .background = load.num_background,
                        .free = load.num_free_blocks,
                        .background_blocks = load.num_background_blocks,
                        .budget = Budget()});
    }
    num_preemptions_ = scheduler_->num_preemptions();
  }

  // Who ran stays on its rank. Who was admitted went, in its turn, where README.md says; told
  // where nothing is cached and nobody was preempted, for then the ranks' room is known.
  void CheckRanks(const StepPlan& plan) {
    const int64_t num_preemptions = scheduler_->num_preemptions();
    const bool can_tell = !config_.prefix_caching && num_preemptions == num_preemptions_;
    bool background = false;
    for (const SequenceStep& sequence : plan.sequences) {
      Client& client = open_[sequence.id];
      if (client.request.background && !std::exchange(background, true)) {
        EndTurn(can_tell, BackgroundCap(plan));
      }
      const bool ran = config_.prefix_caching
                           ? client.rank >= 0 && client.num_preemptions == num_preemptions
                           : sequence.num_computed_tokens > 0;
      Load& load = loads_[sequence.dp_rank];
      if (ran) {
        Check(sequence.dp_rank == client.rank, "a running sequence changes its rank");
      } else if (can_tell) {
        Check(BestLoad(client) == &load, "admitted to another rank than the best");
        ++load.running;
        load.background += background;
      }
      const int32_t num_blocks = sequence.num_blocks - (ran ? client.num_blocks : 0);
      load.budget -= sequence.num_tokens;
      load.tokens += sequence.num_tokens;
      load.free -= num_blocks;
      load.background_blocks += background ? num_blocks : 0;
      client.rank = sequence.dp_rank;
      client.num_blocks = sequence.num_blocks;
      client.num_preemptions = num_preemptions;
    }
    if (!background) EndTurn(can_tell, BackgroundCap(plan));
    if (can_tell) CheckFirstInLine(/*background=*/true);
  }

  // All but the background sequences have what they get.
  void EndTurn(bool can_tell, int32_t background_cap) {
    if (can_tell) CheckFirstInLine(/*background=*/false);
    for (Load& load : loads_) load.budget = std::min(load.budget, background_cap);
  }

  const Load* BestLoad(const Client& client) const {
    int32_t most_room = -1;
    for (const Load& load : loads_) {
      if (Takes(load, client)) most_room = std::max(most_room, Room(load, client));
    }
    const Load* best = nullptr;
    for (const Load& load : loads_) {
      if (!Takes(load, client)) continue;
      if (Room(load, client) < most_room - most_room / 8) continue;
      if (best == nullptr || load.tokens < best->tokens ||
          (load.tokens == best->tokens && Room(load, client) > Room(*best, client))) {
        best = &load;
      }
    }
    return best;
  }

  // Blocks that a rank has left behind a sequence with nothing computed.
  int32_t Room(const Load& load, const Client& client) const {
    const int32_t free = load.free + (client.request.background ? 0 : load.background_blocks);
    return free - (Lacks(client) + block_size_ - 1) / block_size_;
  }

  bool Takes(const Load& load, const Client& client) const {
    const bool background = client.request.background;
    const int32_t max_running = std::min(config_.max_running, engine_->info().max_sequences);
    return load.budget > 0 && Room(load, client) >= (background ? load.running : 0) &&
           load.running - (background ? 0 : load.background) < max_running;
  }

  // No rank would take the first in line; told where all that wait have never run.
  void CheckFirstInLine(bool background) const {
    const int32_t num_waiting =
        background ? scheduler_->num_background_waiting()
                   : scheduler_->num_waiting() - scheduler_->num_background_waiting();
    if (num_waiting != NumNotStarted(background)) return;
    const Client* first = nullptr;
    for (const auto& [id, client] : open_) {
      if (client.started || client.request.background != background) continue;
      if (first == nullptr || ComesBefore(client, *first)) first = &client;
    }
    if (first == nullptr) return;
    Check(BestLoad(*first) == nullptr, "the first in line waits, and there is a rank for it");
  }

  static bool ComesBefore(const Client& a, const Client& b) {
    return a.request.priority != b.request.priority ? a.request.priority > b.request.priority
                                                    : a.arrival < b.arrival;
  }

  // All tokens that a sequence with nothing computed is to compute.
  static int32_t Lacks(const Client& client) {
    return static_cast<int32_t>(client.request.prompt.size() + client.got.size());
  }

  void CancelInStep(const StepPlan& plan) {
    const RequestId id = plan.sequences[Pick(0, static_cast<int>(plan.sequences.size()) - 1)].id;
    scheduler_->Cancel(id);
    if (shadow_ != nullptr) shadow_->Cancel(id);
    scheduler_->CheckInvariants();
    open_.erase(id);
    ++report_->num_cancelled;
    ++report_->num_cancelled_in_step;
  }

  // Who started was next in line, and its hit is a prefix that was computed under its salt.
  void CheckStarted() {
    for (const SequenceEvent& event : scheduler_->started()) {
      const auto it = open_.find(event.id);
      Check(it != open_.end() && !it->second.started, "started twice, or after its end");
      Client& client = it->second;
      for (const auto& [id, other] : open_) {
        if (other.request.background != client.request.background) continue;
        Check(!ComesBefore(other, client) || other.started, "admitted out of order");
      }
      client.started = true;
      Check(event.cached_tokens >= 0 && event.cached_tokens % block_size_ == 0 &&
                event.cached_tokens < static_cast<int32_t>(client.request.prompt.size()),
            "cached_tokens is no number of blocks before the last token");
      const std::vector<TokenId>& prompt = client.request.prompt;
      Check(event.cached_tokens == 0 || computed_[client.request.cache_salt].contains(
                                            {prompt.begin(), prompt.begin() + event.cached_tokens}),
            "a hit on what was not computed under this salt");
    }
  }

  // Every prefix that fills blocks and was computed, under its salt. CheckFailures() forgets them.
  void NoteComputed(const StepPlan& plan) {
    for (const SequenceStep& sequence : plan.sequences) {
      const Client& client = open_[sequence.id];
      std::vector<TokenId> tokens = client.request.prompt;
      tokens.insert(tokens.end(), client.got.begin(), client.got.end());
      const int32_t end = sequence.num_computed_tokens + sequence.num_tokens;
      for (int32_t n = block_size_; n <= end; n += block_size_) {
        computed_[client.request.cache_salt].insert({tokens.begin(), tokens.begin() + n});
      }
    }
  }

  void TakeToken(const SequenceEvent& event) {
    Check(event.kind == SequenceEvent::Kind::kToken, "Update makes another event than a token");
    const auto it = open_.find(event.id);
    Check(it != open_.end(), "a token after the end");
    Client& client = it->second;
    Check(client.started, "a token before the start");
    client.got.push_back(event.token);
    const size_t count = client.got.size();
    Check(count <= client.expected.size() && event.token == client.expected[count - 1],
          absl::StrCat("request ", event.id, ": token ", count, " is not the oracle's"));
    const std::vector<TokenId>& stops = client.request.stop_token_ids;
    FinishReason finish = FinishReason::kNone;
    if (count == client.expected.size()) {
      const bool stopped = std::find(stops.begin(), stops.end(), event.token) != stops.end();
      finish = stopped ? FinishReason::kStop : FinishReason::kLength;
    }
    Check(event.finish == finish, absl::StrCat("request ", event.id, ": a wrong finish"));
    if (finish == FinishReason::kNone) return;
    ++report_->num_finished;
    if (client.request.background) ++report_->num_background_finished;
    if (finish == FinishReason::kStop) ++report_->num_stopped;
    std::vector<TokenId> answered = client.request.prompt;
    answered.insert(answered.end(), client.got.begin(), client.got.end());
    if (answered_.size() >= 20) answered_.erase(answered_.begin());
    answered_.push_back(std::move(answered));
    open_.erase(it);
  }

  void CheckFailures(const StepPlan& plan, const std::vector<SequenceEvent>& events) {
    std::set<RequestId> planned;
    for (const SequenceStep& sequence : plan.sequences) planned.insert(sequence.id);
    std::set<RequestId> failed;
    for (const SequenceEvent& event : events) {
      Check(event.kind == SequenceEvent::Kind::kFailed && event.finish == FinishReason::kError &&
                !event.error.ok(),
            "Abort makes another event than a failure");
      Check(open_.contains(event.id) && failed.insert(event.id).second, "failed after its end");
      Check(planned.contains(event.id), "failed by a step that did not compute it");
    }
    for (const RequestId id : planned) {
      Check(!open_.contains(id) || failed.contains(id), "a sequence of a failed step goes on");
    }
    for (const RequestId id : failed) open_.erase(id);
    for (auto& [id, client] : open_) client.rank = -1;
    report_->num_failed += static_cast<int64_t>(failed.size());
    for (auto& [salt, prefixes] : computed_) prefixes.clear();
  }

  // After a lost step nobody fails but who lost more than max_recoveries; all others keep what they
  // have, and nothing is cached.
  void CheckRestart(const StepPlan& plan, const std::vector<SequenceEvent>& events) {
    for (const SequenceStep& sequence : plan.sequences) {
      if (open_.contains(sequence.id)) ++open_[sequence.id].num_lost_steps;
    }
    for (auto& [id, client] : open_) {
      if (client.started) ++client.num_lost_steps_since;
      client.rank = -1;
    }
    std::set<RequestId> failed;
    for (const SequenceEvent& event : events) {
      Check(event.kind == SequenceEvent::Kind::kFailed && absl::IsUnavailable(event.error),
            "Restart makes another event than UNAVAILABLE");
      Check(open_.contains(event.id) && failed.insert(event.id).second, "failed after its end");
      Check(open_[event.id].num_lost_steps_since > config_.max_recoveries,
            "failed before max_recoveries");
    }
    for (const auto& [id, client] : open_) {
      Check(client.num_lost_steps <= config_.max_recoveries || failed.contains(id),
            "a request goes on after more than max_recoveries");
    }
    Check(scheduler_->num_running() == 0, "a sequence runs after a lost step");
    for (const RequestId id : failed) open_.erase(id);
    report_->num_unrecovered += static_cast<int64_t>(failed.size());
    for (auto& [salt, prefixes] : computed_) prefixes.clear();
  }

  int32_t NumNotStarted(bool background) const {
    return static_cast<int32_t>(std::count_if(open_.begin(), open_.end(), [&](const auto& entry) {
      return !entry.second.started && entry.second.request.background == background;
    }));
  }

  const uint64_t seed_;
  std::mt19937_64 random_;
  RandomStepsReport* const report_;

  int32_t block_size_ = 0;
  SchedulerConfig config_;
  int max_priority_ = 0;
  int num_salts_ = 1;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ShadowScheduler> shadow_;  // null where plans cannot be compared
  bool has_background_ = false;
  std::vector<std::vector<TokenId>> phrases_;   // blocks that prompts are made of
  std::vector<std::vector<TokenId>> answered_;  // prompts with their answers
  std::map<RequestId, Client> open_;            // requests without an end yet
  std::map<std::string, std::set<std::vector<TokenId>>> computed_;  // by salt
  RequestId next_id_ = 1;
  int64_t next_arrival_ = 0;
  int64_t next_step_ = 0;
  int64_t step_ = 0;
  std::vector<Load> loads_;      // before the step; CheckRanks() goes through it with them
  int64_t num_preemptions_ = 0;  // likewise
};

}  // namespace

RandomStepsReport RunRandomSteps(uint64_t seed, int64_t num_steps) {
  constexpr int64_t kStepsOfWorld = 400;
  RandomStepsReport report;
  while (report.num_steps < num_steps) {
    World(seed++, &report).Run(std::min(kStepsOfWorld, num_steps - report.num_steps));
  }
  return report;
}

}  // namespace latentd
