// The test of the property test: each bug that is built into a copy of the scheduler must be found.
#include "planted_bugs.h"

#include <gtest/gtest.h>

#include <iterator>
#include <string>

#include "tests/scheduler/random_steps.h"

namespace latentd {
namespace {

// As many as the property test's short form runs.
constexpr int64_t kNumSteps = 100'000;

TEST(PlantedBugsTest, WithoutABugNothingIsFound) {
  planted_bug = -1;
  EXPECT_GE(RunRandomSteps(/*seed=*/1, kNumSteps).num_steps, kNumSteps);
}

class PlantedBugsDeathTest : public ::testing::TestWithParam<int> {};

TEST_P(PlantedBugsDeathTest, IsFound) {
  SCOPED_TRACE(kPlantedBugs[GetParam()]);
  planted_bug = GetParam();
  EXPECT_DEATH(RunRandomSteps(/*seed=*/1, kNumSteps), "check failed");
}

INSTANTIATE_TEST_SUITE_P(All, PlantedBugsDeathTest,
                         ::testing::Range(0, static_cast<int>(std::size(kPlantedBugs))),
                         [](const ::testing::TestParamInfo<int>& info) {
                           std::string name = kPlantedBugs[info.param];
                           for (char& c : name) c = std::isalnum(c) ? c : '_';
                           return name;
                         });

}  // namespace
}  // namespace latentd
