#ifndef LATENTD_SCHEDULER_SCHEDULER_H_
#define LATENTD_SCHEDULER_SCHEDULER_H_

#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <tuple>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "engine/step.h"
#include "scheduler/block_pool.h"
#include "scheduler/request.h"
#include "scheduler/sequence.h"

namespace latentd {

struct SchedulerConfig {
  int32_t max_step_tokens = 8192;  // >= 1: tokens of one rank in a step; at most the engine's
  int32_t max_running = 256;       // >= 1: running sequences of one rank; at most the engine's
  // >= 1: requests not begun yet; beyond this, a request is refused. Background ones are counted
  // apart, up to the same number.
  int32_t max_waiting = 1024;
  bool prefix_caching = true;
  int32_t max_recoveries = 2;  // >= 0: lost steps that a request survives; the next one fails it
  // >= 0: background tokens of one rank in a step that computes others too; 0: what these leave.
  int32_t max_background_tokens = 0;
};

// OK when `request` is well-formed and could run alone on an empty engine; else INVALID_ARGUMENT
// with the field, its value and the limit. Any thread.
absl::Status CheckRequest(const Request& request, const EngineInfo& engine,
                          int32_t block_size = kBlockSize);

// Decides, step by step, which tokens of which sequences to compute.
//
//   plan   = scheduler.Schedule();
//   result = engine.Execute(plan);
//   events = scheduler.Update(plan, result);     or Restart(plan, error), or Abort(plan, error)
//
// Pure bookkeeping: no threads, no clock, no I/O, no device. The same calls give the same plans.
// The policy and the invariants are in README.md. Not thread-safe; EngineCore owns it.
//
// From Schedule() to Update(), Restart() or Abort() a step is under way: the engine may be writing
// the blocks of its plan. None of them is handed out before the step is over, because only
// Schedule() hands out blocks and it must not be called within a step; Cancel() may be.
class Scheduler {
 public:
  // What only tests change.
  struct BlockOptions {
    int32_t block_size = kBlockSize;
    BlockHashFunction hash = HashBlock;
  };

  Scheduler(const SchedulerConfig& config, const EngineInfo& engine)
      : Scheduler(config, engine, BlockOptions()) {}
  Scheduler(const SchedulerConfig& config, const EngineInfo& engine, BlockOptions options);

  Scheduler(const Scheduler&) = delete;
  Scheduler& operator=(const Scheduler&) = delete;

  // Queues a request. INVALID_ARGUMENT if it could never fit, RESOURCE_EXHAUSTED if max_waiting of
  // its class (background or not) wait already, ALREADY_EXISTS if its id is in use.
  absl::Status Add(Request request);

  // Forgets a request; its blocks are free from the next Schedule() on. No events of it follow.
  // No-op if unknown.
  void Cancel(RequestId id);

  // Plans the next step. An empty plan means that there is nothing to run, and begins no step.
  // REQUIRES: no step is under way.
  StepPlan Schedule();

  // The kStarted events of the latest Schedule(): the requests it admitted for the first time.
  const std::vector<SequenceEvent>& started() const { return started_; }

  // Applies the result of the step under way, and ends it. INTERNAL when the result does not fit
  // the plan; then nothing has changed and the step is to be ended by Abort().
  absl::StatusOr<std::vector<SequenceEvent>> Update(const StepPlan& plan, const StepResult& result);

  // Ends the step under way after the engine lost it (ABORTED), and with it the whole cache: all
  // running sequences wait to be computed again from their first token, and keep what they have
  // drawn. Those for which it is one loss more than max_recoveries fail with UNAVAILABLE. A step
  // that was not begun (CANCELLED) is no loss of theirs.
  std::vector<SequenceEvent> Restart(const StepPlan& plan, const absl::Status& error);

  // Ends the step under way after another error of the engine, whose cache is undefined now: the
  // sequences of the plan fail with `error`; the other running ones wait to be computed again from
  // their first token; nothing is cached any more.
  std::vector<SequenceEvent> Abort(const StepPlan& plan, const absl::Status& error);

  // Fails all requests, waiting ones too.
  // REQUIRES: no step is under way.
  std::vector<SequenceEvent> FailAll(const absl::Status& error);

  // No requests at all.
  bool idle() const { return sequences_.empty(); }

  int32_t num_running() const { return static_cast<int32_t>(running_.size()); }
  int32_t num_waiting() const { return static_cast<int32_t>(waiting_.size()); }
  // Of those, the background ones.
  int32_t num_background_running() const;
  int32_t num_background_waiting() const { return num_background_ - num_background_running(); }
  // Of the waiting ones of a class, those that never ran.
  int32_t num_not_started(bool background = false) const { return num_not_started_[background]; }
  int32_t num_background_tokens() const { return num_background_tokens_; }  // of the latest plan
  int32_t num_blocks() const;                                               // all dp_ranks
  int32_t num_free_blocks() const;                                          // all dp_ranks
  int64_t num_preemptions() const { return num_preemptions_; }
  int64_t num_background_preemptions() const { return num_background_preemptions_; }  // of those
  int64_t num_restarts() const { return num_restarts_; }    // steps that Restart() ended
  int64_t num_recovered() const { return num_recovered_; }  // running sequences, over all of those
  int64_t prompt_tokens() const { return prompt_tokens_; }  // of started requests
  int64_t cached_tokens() const { return cached_tokens_; }  // of those, found in the cache

  struct RankLoad {
    int32_t num_running = 0;
    int32_t num_background = 0;  // of those
    int32_t num_free_blocks = 0;
    int32_t num_background_blocks = 0;  // that background sequences alone hold
  };
  RankLoad load(int32_t dp_rank) const;

  // Aborts unless the invariants hold. O(everything); for tests.
  void CheckInvariants() const;

 private:
  // Waiting requests in the order of their admission: background ones last, by priority, then by
  // arrival.
  using WaitingKey = std::tuple<bool, int64_t, int64_t>;  // background, -priority, arrival
  static WaitingKey KeyOf(const Sequence& sequence);
  static bool RunsBefore(const Sequence* a, const Sequence* b);

  // One attention replica, and what the step being planned has left for it.
  struct Rank {
    Rank(int32_t num_blocks, int32_t block_size) : pool(num_blocks, block_size) {}

    BlockPool pool;
    int32_t num_running = 0;
    int32_t num_background = 0;          // of those
    int32_t budget = 0;                  // tokens
    int32_t num_tokens = 0;              // in the step so far
    std::array<bool, 2> preempted = {};  // somebody, in this step: [background]
  };

  // A sequence's share of the step under way, in plan order.
  struct Share {
    Sequence* sequence;
    int32_t num_tokens;
  };

  // Schedule(), part by part, first for all but the background sequences.
  void ContinueRunning(bool background);
  void AdmitWaiting(bool background);
  void CapBackground();
  StepPlan MakePlan();

  // Makes sure that there are free blocks for the first `num_tokens` tokens of a running sequence,
  // by preempting others of its rank or, at last, itself: false then.
  bool MakeRoom(Sequence* sequence, int32_t num_tokens);
  Sequence* FindVictim(int32_t dp_rank) const;
  void Preempt(Sequence* sequence);

  // The rank for a waiting sequence, or -1 if none takes it now: of those with about the most room
  // the one that has least to compute in this step. What background sequences hold counts as room
  // for the others.
  int32_t ChooseRank(Sequence* sequence) const;
  // Lets one that is in waiting_ no more run there; background ones make way for others.
  void Run(Sequence* sequence, int32_t rank);
  // Takes a running sequence's next tokens into the step. REQUIRES: there is room for them.
  void AddShare(Sequence* sequence, int32_t num_tokens);

  absl::Status CheckResult(const StepPlan& plan, const StepResult& result) const;
  void Suspend(Sequence* sequence);  // into waiting_, nothing computed; the caller tends running_
  void SuspendAll();                 // the running ones; and nothing is cached any more
  void Forget(absl::Span<Sequence* const> sequences);
  void EndStep();

  const SchedulerConfig config_;
  const EngineInfo engine_;
  const BlockOptions options_;
  const int32_t max_step_tokens_;  // of a rank: the lower of the configured and the engine's
  const int32_t max_running_;      // likewise

  std::deque<Rank> ranks_;  // [num_dp_ranks]; before the sequences, whose tables refer to the pools
  absl::flat_hash_map<RequestId, std::unique_ptr<Sequence>> sequences_;  // each waits or runs
  absl::btree_map<WaitingKey, Sequence*> waiting_;
  std::vector<Sequence*> running_;  // background ones last, the oldest first
  int64_t next_arrival_ = 0;
  int32_t num_background_ = 0;                   // of sequences_
  std::array<int32_t, 2> num_not_started_ = {};  // [background]

  int64_t next_step_ = 0;
  bool in_step_ = false;
  std::vector<Share> shares_;
  int32_t num_background_tokens_ = 0;
  std::vector<SequenceEvent> started_;

  int64_t num_preemptions_ = 0;
  int64_t num_background_preemptions_ = 0;
  int64_t num_restarts_ = 0;
  int64_t num_recovered_ = 0;
  int64_t prompt_tokens_ = 0;
  int64_t cached_tokens_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_SCHEDULER_H_
