// The prefix cache and the choice of a rank, as the scheduler uses them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "tests/scheduler/scheduler_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

// ---- the prefix cache ----

class PrefixCacheTest : public SchedulerTest {
 protected:
  // Runs a request of `prompt` to its end and returns how many tokens came from the cache.
  int32_t CachedTokens(std::vector<TokenId> prompt, std::string salt = "") {
    Request request;
    request.id = next_id_++;
    request.prompt = std::move(prompt);
    request.max_new_tokens = 2;
    request.cache_salt = std::move(salt);
    EXPECT_TRUE(Add(request).ok());
    Step();
    const std::vector<SequenceEvent>& started = scheduler_->started();
    EXPECT_THAT(started, SizeIs(1));
    const int32_t cached_tokens = started[0].cached_tokens;
    RunToEnd();
    return cached_tokens;
  }

  RequestId next_id_ = 1;
};

TEST_F(PrefixCacheTest, FullBlocksAreFoundAgainButNeverTheLastToken) {
  Make(SmallEngine());
  EXPECT_EQ(CachedTokens(Prompt(9, 1)), 0);
  EXPECT_EQ(CachedTokens(Prompt(9, 1)), 8);
  EXPECT_EQ(CachedTokens(Prompt(8, 1)), 4);
  EXPECT_EQ(CachedTokens(Prompt(4, 1)), 0);
  EXPECT_EQ(CachedTokens(Prompt(7, 1)), 4);
  EXPECT_EQ(CachedTokens(Prompt(9, 2)), 0);
  EXPECT_EQ(scheduler_->cached_tokens(), 16);
  EXPECT_EQ(scheduler_->prompt_tokens(), 46);
}

TEST_F(PrefixCacheTest, TheAnswerIsCachedWithItsPrompt) {
  Make(SmallEngine());
  EXPECT_EQ(CachedTokens(Prompt(7, 1)), 0);
  std::vector<TokenId> conversation = Prompt(7, 1);
  conversation.insert(conversation.end(), tokens_[1].begin(), tokens_[1].end());
  EXPECT_EQ(CachedTokens(conversation), 8);
}

TEST_F(PrefixCacheTest, SaltsShareNothing) {
  Make(SmallEngine());
  EXPECT_EQ(CachedTokens(Prompt(9, 1), "a"), 0);
  EXPECT_EQ(CachedTokens(Prompt(9, 1), "b"), 0);
  EXPECT_EQ(CachedTokens(Prompt(9, 1)), 0);
  EXPECT_EQ(CachedTokens(Prompt(9, 1), "a"), 8);
}

TEST_F(PrefixCacheTest, ABlockBehindAnotherPrefixIsAnother) {
  Make(SmallEngine());
  std::vector<TokenId> prompt = Prompt(9, 1);
  EXPECT_EQ(CachedTokens(prompt), 0);
  prompt[0] = 99;
  EXPECT_EQ(CachedTokens(prompt), 0);
}

TEST_F(PrefixCacheTest, RunningSequencesShareBlocks) {
  Make(SmallEngine());
  Request first = MakeRequest(1, 18, 8);
  ASSERT_TRUE(Add(first).ok());
  Step();
  first.id = 2;
  ASSERT_TRUE(Add(first).ok());
  const StepPlan plan = Step();
  EXPECT_THAT(Ids(plan), ElementsAre(1, 2));
  EXPECT_EQ(plan.sequences[1].num_computed_tokens, 16);
  EXPECT_EQ(scheduler_->num_free_blocks(), 8 - 5 - 1);  // five of the first, one of the second
  RunToEnd();
}

TEST_F(PrefixCacheTest, MayBeSwitchedOff) {
  Make(SmallEngine(), {.prefix_caching = false});
  EXPECT_EQ(CachedTokens(Prompt(9, 1)), 0);
  EXPECT_EQ(CachedTokens(Prompt(9, 1)), 0);
}

// ---- several ranks ----

class RanksTest : public SchedulerTest {
 protected:
  void MakeRanks(int32_t num_dp_ranks, const SchedulerConfig& config = {}) {
    EngineInfo info = SmallEngine();
    info.num_dp_ranks = num_dp_ranks;
    Make(info, config);
  }

  static std::map<RequestId, int32_t> Ranks(const StepPlan& plan) {
    std::map<RequestId, int32_t> ranks;
    for (const SequenceStep& step : plan.sequences) ranks[step.id] = step.dp_rank;
    return ranks;
  }
};

TEST_F(RanksTest, ASequenceGoesWhereThereIsMostRoomAndStays) {
  MakeRanks(3);
  ASSERT_TRUE(Add(1, 9, 6).ok());
  ASSERT_TRUE(Add(2, 5, 6).ok());
  ASSERT_TRUE(Add(3, 4, 6).ok());
  ASSERT_TRUE(Add(4, 4, 6).ok());
  std::map<RequestId, int32_t> ranks = Ranks(Step());
  EXPECT_THAT(ranks,
              ElementsAre(std::pair(1, 0), std::pair(2, 1), std::pair(3, 2), std::pair(4, 2)));
  while (!scheduler_->idle()) {
    for (const auto& [id, rank] : Ranks(Step())) EXPECT_EQ(rank, ranks[id]);
  }
}

TEST_F(RanksTest, ThePrefixPullsASequenceToItsRank) {
  MakeRanks(2);
  ASSERT_TRUE(Add(1, 4, 1).ok());
  ASSERT_TRUE(Add(2, 13, 1).ok());
  EXPECT_EQ(Ranks(Step())[2], 1);
  ASSERT_TRUE(scheduler_->idle());
  Request again = MakeRequest(2, 13, 1);
  again.id = 3;
  ASSERT_TRUE(Add(again).ok());
  const StepPlan plan = Step();
  EXPECT_EQ(plan.sequences[0].dp_rank, 1);
  EXPECT_EQ(plan.sequences[0].num_computed_tokens, 12);
}

TEST_F(RanksTest, APreemptedSequenceMayGoToAnotherRank) {
  MakeRanks(2);
  ASSERT_TRUE(Add(1, 16, 14).ok());  // rank 0
  ASSERT_TRUE(Add(2, 16, 2).ok());   // rank 1
  ASSERT_TRUE(Add(3, 12, 12).ok());  // rank 0
  EXPECT_THAT(Ranks(Step()), ElementsAre(std::pair(1, 0), std::pair(2, 1), std::pair(3, 0)));
  int32_t last_rank = 0;
  while (!scheduler_->idle()) {
    const std::map<RequestId, int32_t> ranks = Ranks(Step());
    if (ranks.contains(3)) last_rank = ranks.at(3);
  }
  EXPECT_GT(scheduler_->num_preemptions(), 0);
  EXPECT_EQ(last_rank, 1);
}

TEST_F(RanksTest, OnlyTheRankThatIsFullPreempts) {
  MakeRanks(2);
  ASSERT_TRUE(Add(1, 16, 4).ok());  // rank 0
  ASSERT_TRUE(Add(2, 16, 4).ok());  // rank 1
  ASSERT_TRUE(Add(3, 16, 4).ok());  // rank 0, full now
  ASSERT_TRUE(Add(4, 8, 4).ok());   // rank 1, the youngest of all
  Step();
  EXPECT_THAT(Ids(Step()), ElementsAre(1, 2, 4));
}

TEST_F(RanksTest, EachRankHasItsOwnBudgetAndItsOwnMaxRunning) {
  MakeRanks(2, {.max_step_tokens = 5, .max_running = 2});
  ASSERT_TRUE(Add(1, 12, 2).ok());  // rank 0
  ASSERT_TRUE(Add(2, 3, 6).ok());   // rank 1
  ASSERT_TRUE(Add(3, 3, 6).ok());   // rank 1, for rank 0 has no tokens left; nor has that one then
  ASSERT_TRUE(Add(4, 3, 6).ok());
  EXPECT_THAT(NumTokens(Step()), ElementsAre(5, 3, 2));
  // Rank 1 has tokens left, but runs two already; rank 0 has a place and no tokens.
  StepPlan plan = Step();
  EXPECT_THAT(Ids(plan), ElementsAre(1, 2, 3));
  EXPECT_THAT(NumTokens(plan), ElementsAre(5, 1, 1));
  plan = Step();
  EXPECT_THAT(NumTokens(plan), ElementsAre(2, 1, 1, 3));
  EXPECT_EQ(Ranks(plan)[4], 0);
  RunToEnd();
}

TEST_F(RanksTest, APreemptionStopsAdmissionToItsRankAlone) {
  MakeRanks(2);
  ASSERT_TRUE(Add(1, 16, 4).ok());  // rank 0
  ASSERT_TRUE(Add(2, 16, 4).ok());  // rank 1
  ASSERT_TRUE(Add(3, 16, 4).ok());  // rank 0, full now
  ASSERT_TRUE(Add(4, 5, 2).ok());   // rank 1
  Step();
  Request urgent = MakeRequest(5, 3, 1);
  urgent.priority = 1;
  ASSERT_TRUE(Add(urgent).ok());
  const StepPlan plan = Step();
  EXPECT_THAT(Ids(plan), ElementsAre(1, 2, 4, 5));
  EXPECT_EQ(Ranks(plan)[5], 1);  // where the last block is, though 3 left three on the other
  RunToEnd();
}

class RoomTest : public RanksTest {
 protected:
  void SetUp() override {
    EngineInfo info = SmallEngine();
    info.num_dp_ranks = 2;
    info.num_blocks = 64;
    Make(info);
  }
};

TEST_F(RoomTest, OfRanksWithAboutTheMostRoomTheIdlerIsTaken) {
  ASSERT_TRUE(Add(1, 24, 9).ok());
  EXPECT_EQ(Ranks(Step())[1], 0);
  ASSERT_TRUE(Add(2, 8, 9).ok());  // as much to compute on either: more room
  ASSERT_TRUE(Add(3, 8, 9).ok());  // a little less room, but rank 1 has a prompt to compute
  std::map<RequestId, int32_t> ranks = Ranks(Step());
  EXPECT_EQ(ranks[2], 1);
  EXPECT_EQ(ranks[3], 0);
  RunToEnd();
}

TEST_F(RoomTest, APrefixCountsForMoreThanALittleRoom) {
  ASSERT_TRUE(Add(1, 33, 1).ok());
  EXPECT_EQ(Ranks(Step())[1], 0);
  ASSERT_TRUE(Add(2, 48, 9).ok());
  EXPECT_EQ(Ranks(Step())[2], 0);
  Request again = MakeRequest(1, 33, 1);
  again.id = 3;
  ASSERT_TRUE(Add(again).ok());  // 51 blocks left behind it here, 55 there
  const StepPlan plan = Step();
  EXPECT_EQ(Ranks(plan)[3], 0);
  EXPECT_EQ(plan.sequences[1].num_computed_tokens, 32);
  RunToEnd();
}

TEST_F(RoomTest, APrefixDoesNotPullWhereThereIsFarLessRoom) {
  ASSERT_TRUE(Add(1, 33, 1).ok());
  EXPECT_EQ(Ranks(Step())[1], 0);
  ASSERT_TRUE(Add(2, 120, 9).ok());
  EXPECT_EQ(Ranks(Step())[2], 0);
  Request again = MakeRequest(1, 33, 1);
  again.id = 3;
  ASSERT_TRUE(Add(again).ok());
  EXPECT_EQ(Ranks(Step())[3], 1);
  RunToEnd();
}

}  // namespace
}  // namespace latentd
