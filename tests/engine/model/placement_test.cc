#include "engine/model/placement.h"

#include "gtest/gtest.h"

namespace latentd {
namespace {

TEST(PlacementTest, EveryExpertHasOneRankAndRanksDifferByOneAtMost) {
  for (int32_t experts : {1, 3, 16, 256}) {
    for (int32_t world : {1, 2, 3, 4, 5, 8, 16, 17}) {
      int32_t next = 0;
      for (int32_t rank = 0; rank < world; ++rank) {
        const ExpertRange range = LocalExperts(experts, rank, world);
        EXPECT_EQ(range.first, next);
        EXPECT_GE(range.count, experts / world);
        EXPECT_LE(range.count, experts / world + 1);
        for (int32_t e = range.first; e < range.first + range.count; ++e) {
          EXPECT_EQ(RankOfExpert(experts, e, world), rank) << e << " of " << experts;
          EXPECT_TRUE(range.contains(e));
        }
        next += range.count;
        EXPECT_FALSE(range.contains(next));
      }
      EXPECT_EQ(next, experts);
    }
  }
}

TEST(PlacementTest, DeepSeekV3OverSixteenRanksIsSixteenEach) {
  EXPECT_EQ(LocalExperts(256, 15, 16).first, 240);
  EXPECT_EQ(LocalExperts(256, 15, 16).count, 16);
}

}  // namespace
}  // namespace latentd
