#ifndef LATENTD_TESTS_ENGINE_CPU_GROUP_HARNESS_H_
#define LATENTD_TESTS_ENGINE_CPU_GROUP_HARNESS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/comm/communicator.h"
#include "engine/cpu/expert_exchange.h"
#include "engine/engine.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"
#include "tests/engine/cpu/harness.h"

namespace latentd {

// Calls body(rank) for each rank, each in a thread of its own.
void OnEachRank(int num_ranks, const std::function<void(int)>& body);

struct GroupRunnerOptions {
  RunnerOptions runner = {.num_threads = 1};  // of each rank
  int max_sequences = 64;                     // likewise
  size_t gather_bytes = ExpertExchange::kGatherBytes;
  bool tcp = false;  // the ranks meet as processes do
};

// All ranks of a group below CpuEngine, as threads: every row's logits, caches full of NaN. One
// rank alone has no exchange.
class GroupRunner : public Engine {
 public:
  GroupRunner(const LoadedModel& model, int num_ranks, const GroupRunnerOptions& options = {});

  // Runs a step and returns the logits of each of its tokens, in plan order: [tokens, vocab_size].
  std::vector<float> Step(const StepPlan& plan);

  // As an engine it draws greedily, and remembers what logits it drew each token from.
  EngineInfo info() const override { return info_; }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;

  // A hash of the logits' bits, by request and position of the token drawn. A token that was
  // computed again from other bits is an error of Execute().
  const std::map<std::pair<RequestId, int>, uint64_t>& prints() const { return prints_; }

 private:
  // The logits of `wanted` tokens of each rank's share: [wanted, vocab_size].
  std::vector<std::vector<float>> RunShares(const StepPlan& plan,
                                            const std::vector<std::vector<int32_t>>& wanted);

  EngineInfo info_;
  std::vector<std::unique_ptr<Runner>> runners_;              // [ranks]
  std::vector<std::unique_ptr<Communicator>> communicators_;  // [ranks]
  std::vector<std::unique_ptr<ExpertExchange>> exchanges_;    // [ranks]
  std::vector<StepPlan> shares_;                              // [ranks]
  std::map<std::pair<RequestId, int>, uint64_t> prints_;
};

// A request, when it comes and when its client goes away.
struct LoadItem {
  Request request;
  int arrival = 0;  // step
  int cancel = -1;  // step; -1: never
};

struct LoadReport {
  std::map<RequestId, std::vector<TokenId>> tokens;
  int64_t num_steps = 0;
  int64_t num_mixed = 0;      // steps with prompts and decodes
  int64_t num_with_idle = 0;  // steps in which a rank had no token
  int64_t num_preemptions = 0;
  int64_t num_cached_tokens = 0;
  int64_t num_cancelled = 0;
};

// `count` requests with prompts of 1 to `max_prompt` tokens, many of which begin alike, and up to
// `max_new` tokens to draw; the same for the same seed.
std::vector<LoadItem> RandomLoad(uint64_t seed, int count, int vocab_size, int max_prompt,
                                 int max_new);

// Runs `load` to its end through a real scheduler. A step that fails ends the test program.
LoadReport RunLoad(const std::vector<LoadItem>& load, const SchedulerConfig& config,
                   Engine* engine);

// Says which request got other tokens in one run than in the other, or too few; empty when none
// did. Of a request whose client went away, what both runs drew is compared.
std::string TokensThatDiffer(const std::vector<LoadItem>& load, const LoadReport& one,
                             const LoadReport& other);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CPU_GROUP_HARNESS_H_
