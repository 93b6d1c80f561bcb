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
    Check(scheduler_->num_not_started() == 0, "a request counts as waiting and is gone");
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
               .prefix_caching = !OneIn(4),
               .max_recoveries = Pick(0, 3)};
    max_priority_ = OneIn(2) ? 0 : 2;
    num_salts_ = OneIn(2) ? 1 : 3;
    scheduler_ = std::make_unique<Scheduler>(
        config_, options.info,
        Scheduler::BlockOptions{.block_size = block_size_,
                                .hash = OneIn(3) ? WeakHash : HashBlock});
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
    request.cache_salt = std::string(Pick(0, num_salts_ - 1), 's');
    request.sampling.seed = random_();
    request.sampling.temperature = static_cast<float>(Pick(0, 4)) / 2;

    const bool fits = CheckRequest(request, engine_->info(), block_size_).ok();
    const bool has_room = NumNotStarted() < config_.max_waiting;
    const absl::Status added = scheduler_->Add(request);
    Check(added.ok() == (fits && has_room), absl::StrCat("Add: ", added.ToString()));
    if (!added.ok()) {
      Check(fits == absl::IsResourceExhausted(added), absl::StrCat("Add: ", added.ToString()));
      ++report_->num_refused;
      return;
    }
    Client& client = open_[request.id];
    client.expected = engine_->Expected(request);
    client.arrival = next_arrival_++;
    client.request = std::move(request);
  }

  void CancelOne() {
    if (open_.empty()) return;
    const auto it = std::next(open_.begin(), Pick(0, static_cast<int>(open_.size()) - 1));
    scheduler_->Cancel(it->first);
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
    std::vector<int32_t> num_tokens(num_ranks), num_sequences(num_ranks);
    for (const SequenceStep& sequence : plan.sequences) {
      Check(open_.contains(sequence.id), "a sequence in the plan that nobody wants");
      num_tokens[sequence.dp_rank] += sequence.num_tokens;
      ++num_sequences[sequence.dp_rank];
    }
    for (int32_t rank = 0; rank < num_ranks; ++rank) {
      Check(num_tokens[rank] <= config_.max_step_tokens, "over the budget");
      Check(num_sequences[rank] <= config_.max_running, "over max_running");
      Check(
          num_tokens[rank] == Budget() || num_sequences[rank] == scheduler_->load(rank).num_running,
          "a running sequence gets nothing of what is left of its rank's budget");
    }
  }

  int32_t Budget() const {
    return std::min(config_.max_step_tokens, engine_->info().max_step_tokens);
  }

  // What the ranks have before a step, for CheckRanks().
  void NoteLoads() {
    loads_.clear();
    for (int32_t rank = 0; rank < engine_->info().num_dp_ranks; ++rank) {
      const Scheduler::RankLoad load = scheduler_->load(rank);
      loads_.push_back({load.num_running, load.num_free_blocks, Budget()});
    }
    num_preemptions_ = scheduler_->num_preemptions();
  }

  // Who ran stays on its rank. Who was admitted went, in its turn, where README.md says; told
  // where nothing is cached and nobody was preempted, for then the ranks' room is known.
  void CheckRanks(const StepPlan& plan) {
    const int64_t num_preemptions = scheduler_->num_preemptions();
    const bool can_tell = !config_.prefix_caching && num_preemptions == num_preemptions_;
    const int32_t max_running = std::min(config_.max_running, engine_->info().max_sequences);
    for (const SequenceStep& sequence : plan.sequences) {
      Client& client = open_[sequence.id];
      const bool ran = client.rank >= 0 && client.num_preemptions == num_preemptions;
      if (ran) {
        Check(sequence.dp_rank == client.rank, "a running sequence changes its rank");
      } else if (can_tell && sequence.num_computed_tokens == 0) {
        const int32_t end = sequence.num_computed_tokens + Lacks(client);
        const int32_t blocks = (end + block_size_ - 1) / block_size_;
        int32_t most_room = 0;
        for (const Load& load : loads_) {
          if (load.Takes(blocks, max_running)) {
            most_room = std::max(most_room, load.free - blocks);
          }
        }
        const Load* best = nullptr;
        for (const Load& load : loads_) {
          if (!load.Takes(blocks, max_running)) continue;
          if (load.free - blocks < most_room - most_room / 8) continue;
          if (best == nullptr || load.budget > best->budget ||
              (load.budget == best->budget && load.free > best->free)) {
            best = &load;
          }
        }
        Check(best != nullptr, "admitted where there is no room");
        Check(best == &loads_[sequence.dp_rank], "admitted to another rank than the best");
        ++loads_[sequence.dp_rank].running;
      }
      Load& load = loads_[sequence.dp_rank];
      load.budget -= sequence.num_tokens;
      load.free -= sequence.num_blocks - (ran ? client.num_blocks : 0);
      client.rank = sequence.dp_rank;
      client.num_blocks = sequence.num_blocks;
      client.num_preemptions = num_preemptions;
    }
    if (can_tell) CheckFirstInLine(max_running);
  }

  // No rank would take the first in line; told where all that wait have never run.
  void CheckFirstInLine(int32_t max_running) const {
    if (scheduler_->num_waiting() != NumNotStarted()) return;
    const Client* first = nullptr;
    for (const auto& [id, client] : open_) {
      if (!client.started && (first == nullptr || ComesBefore(client, *first))) first = &client;
    }
    if (first == nullptr) return;
    for (const Load& load : loads_) {
      Check(!load.Takes((Lacks(*first) + block_size_ - 1) / block_size_, max_running),
            "the first in line waits, and there is a rank for it");
    }
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

  int32_t NumNotStarted() const {
    return static_cast<int32_t>(std::count_if(
        open_.begin(), open_.end(), [](const auto& entry) { return !entry.second.started; }));
  }

  struct Load {
    int32_t running;
    int32_t free;    // blocks
    int32_t budget;  // tokens

    bool Takes(int32_t blocks, int32_t max_running) const {
      return budget > 0 && free >= blocks && running < max_running;
    }
  };

  const uint64_t seed_;
  std::mt19937_64 random_;
  RandomStepsReport* const report_;

  int32_t block_size_ = 0;
  SchedulerConfig config_;
  int max_priority_ = 0;
  int num_salts_ = 1;
  std::unique_ptr<FakeEngine> engine_;
  std::unique_ptr<Scheduler> scheduler_;
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
