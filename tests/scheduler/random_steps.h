#ifndef LATENTD_TESTS_SCHEDULER_RANDOM_STEPS_H_
#define LATENTD_TESTS_SCHEDULER_RANDOM_STEPS_H_

#include <cstdint>

namespace latentd {

// What happened in the random steps: a test that preempts nothing proves nothing about preemption.
struct RandomStepsReport {
  int64_t num_worlds = 0;
  int64_t num_steps = 0;
  int64_t num_failed_steps = 0;
  int64_t num_lost_steps = 0;
  int64_t num_finished = 0;
  int64_t num_stopped = 0;  // of the finished, by a stop token
  int64_t num_cancelled = 0;
  int64_t num_cancelled_in_step = 0;  // of those, while a step was under way that computed them
  int64_t num_failed = 0;
  int64_t num_recovered = 0;    // running sequences that a lost step sent back
  int64_t num_unrecovered = 0;  // failed by one lost step too many
  int64_t num_refused = 0;
  int64_t num_preemptions = 0;
  int64_t num_cached_tokens = 0;
  int64_t num_background_finished = 0;
  int64_t num_shadow_steps = 0;  // compared with those of a scheduler without background requests
};

// Runs `num_steps` steps of schedulers of random shape (block size, pool, ranks, limits, hash)
// under random requests, cancels, failing and lost steps, with a FakeEngine. After each Schedule
// and Update it checks the invariants, that the plan keeps to each rank's limits and leaves nobody
// out for whom there is a budget, that admission is in order and to the rank that README.md says,
// that a sequence stays there, that a hit was computed before under the same salt; that background
// requests change nothing in the others' plans (where nothing is cached: what is, they share); and
// that each request gets the tokens it should, lost steps or not.
//
// Aborts, saying which world and what, when something does not hold. The same seed, the same steps.
RandomStepsReport RunRandomSteps(uint64_t seed, int64_t num_steps);

}  // namespace latentd

#endif  // LATENTD_TESTS_SCHEDULER_RANDOM_STEPS_H_
