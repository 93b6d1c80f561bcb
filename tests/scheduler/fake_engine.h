#ifndef LATENTD_TESTS_SCHEDULER_FAKE_ENGINE_H_
#define LATENTD_TESTS_SCHEDULER_FAKE_ENGINE_H_

#include <atomic>
#include <cstdint>
#include <random>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/engine.h"
#include "engine/step.h"
#include "scheduler/request.h"

namespace latentd {

struct FakeEngineOptions {
  EngineInfo info = {.num_blocks = 4096,
                     .num_dp_ranks = 1,
                     .max_step_tokens = 8192,
                     .max_sequences = 4096,
                     .max_model_len = 65536,
                     .vocab_size = 1000};
  int32_t block_size = kBlockSize;

  // The next token depends on the last one and its position alone: O(1) a sequence, no cache. For
  // load tests; it would not notice a wrong block.
  bool zero_compute = false;

  TokenId eos_token_id = 0;
  double eos_probability = 0;  // of drawing it, at each token

  absl::Duration step_delay = absl::ZeroDuration();  // a step takes at least this long
  double failure_probability = 0;  // of a step failing with UNAVAILABLE and ruining the cache
  double abort_probability = 0;    // of a step failing with ABORTED and ruining the cache
  int max_unready_looks = 0;  // after ABORTED, ready() is false when it is asked so often, at most
  uint64_t failure_seed = 0;  // draws what fails, and for how long
};

// An engine without a model, whose answers tell whether the scheduler kept its books.
//
// The "KV" of a token is a hash of the whole sequence up to it, made from the KV before it, which
// is read through the block table; the next token is a hash of all the KV read back, and of the
// sampling parameters. So any wrong block, slot, chunk, cache hit or preemption changes the output,
// and Expected() says what it should have been. Before anything runs, each plan is checked against
// the contract of step.h and engine.h; a breach is INVALID_ARGUMENT and ruins nothing.
//
// Thread rule as Engine; abort_next_steps() to num_steps() from any thread.
class FakeEngine : public Engine {
 public:
  explicit FakeEngine(const FakeEngineOptions& options = {});

  EngineInfo info() const override { return options_.info; }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;

  // The tokens that `request` gets, to its end. Needs no cache.
  std::vector<TokenId> Expected(const Request& request) const;

  // The next `count` steps fail with ABORTED.
  void abort_next_steps(int count) { num_steps_to_abort_ = count; }

  // From now on as if a rank were missing: steps fail with ABORTED; or no more.
  void set_ready(bool ready) { is_there_ = ready; }
  bool ready() const override;

  // The next `count` steps fail with UNAVAILABLE.
  void fail_next_steps(int count) { num_steps_to_fail_ = count; }

  // From now on every step fails with UNAVAILABLE, and the engine is lost.
  void lose() { lost_ = true; }
  bool lost() const override { return lost_; }

  int64_t num_steps() const { return num_steps_; }  // executed, failed ones too

  // OK if `plan` keeps to the contract.
  absl::Status CheckPlan(const StepPlan& plan) const;

 private:
  // Where the arrays of one sequence begin.
  struct Offsets {
    size_t token = 0;
    size_t block = 0;
    size_t suppressed = 0;
  };

  absl::Status CheckSequence(const SequenceStep& step, const StepPlan& plan, Offsets at) const;
  absl::Status CheckAliasing(const StepPlan& plan) const;
  uint64_t Compute(const SequenceStep& step, const StepPlan& plan, Offsets at);
  TokenId Draw(uint64_t context, int32_t position, const SamplingParams& sampling,
               absl::Span<const TokenId> suppressed) const;
  bool Happens(std::atomic<int>* forced, double probability);
  void RuinCache();

  const FakeEngineOptions options_;
  std::vector<std::vector<uint64_t>> cache_;  // [num_dp_ranks][num_blocks * block_size]
  std::mt19937_64 random_;
  std::atomic<int> num_steps_to_abort_ = 0;
  std::atomic<bool> is_there_ = true;
  mutable std::atomic<int> num_unready_looks_ = 0;  // that are still to come
  std::atomic<int> num_steps_to_fail_ = 0;
  std::atomic<bool> lost_ = false;
  std::atomic<int64_t> num_steps_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SCHEDULER_FAKE_ENGINE_H_
