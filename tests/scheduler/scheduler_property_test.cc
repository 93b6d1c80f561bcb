#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "tests/scheduler/random_steps.h"

namespace latentd {
namespace {

// 10^5 steps; 10^6 with LATENTD_TEST_LONG=1.
TEST(SchedulerPropertyTest, EveryRequestGetsTheOraclesTokens) {
  const char* const is_long = std::getenv("LATENTD_TEST_LONG");
  const int64_t num_steps = is_long != nullptr && *is_long == '1' ? 1'000'000 : 100'000;
  const RandomStepsReport report = RunRandomSteps(/*seed=*/1, num_steps);
  std::cout << report.num_worlds << " worlds, " << report.num_steps << " steps ("
            << report.num_failed_steps << " failed, " << report.num_lost_steps << " lost), "
            << report.num_finished << " requests finished (" << report.num_stopped
            << " by a stop token), " << report.num_cancelled << " cancelled ("
            << report.num_cancelled_in_step << " within a step), " << report.num_failed
            << " failed, " << report.num_refused << " refused, " << report.num_preemptions
            << " preemptions, " << report.num_cached_tokens << " cached tokens, "
            << report.num_recovered << " sequences recovered, " << report.num_unrecovered
            << " once too often, " << report.num_background_finished
            << " background requests finished, " << report.num_shadow_steps
            << " steps compared with those of a scheduler without background requests\n";
  // Each thing that can go wrong happened often enough to show it.
  EXPECT_GE(report.num_steps, num_steps);
  EXPECT_GT(report.num_finished, num_steps / 20);
  EXPECT_GT(report.num_stopped, num_steps / 100);
  EXPECT_GT(report.num_cancelled_in_step, num_steps / 200);
  EXPECT_GT(report.num_failed_steps, num_steps / 1000);
  EXPECT_GT(report.num_lost_steps, num_steps / 200);
  EXPECT_GT(report.num_recovered, num_steps / 200);
  EXPECT_GT(report.num_unrecovered, num_steps / 1000);
  EXPECT_GT(report.num_refused, num_steps / 100);
  EXPECT_GT(report.num_preemptions, num_steps / 200);
  EXPECT_GT(report.num_cached_tokens, num_steps / 20);
  EXPECT_GT(report.num_background_finished, num_steps / 50);
  EXPECT_GT(report.num_shadow_steps, num_steps / 50);
}

}  // namespace
}  // namespace latentd
