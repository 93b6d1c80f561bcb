// The group of threads as one engine, over members that compute nothing: what each one is asked,
// how errors are told, and that a hang is none.

#include "engine/local_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace latentd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// Draws 100 * rank + the number of tokens of each sequence; fails, or waits for its group, when it
// is told to.
class FakeMember : public GroupMember {
 public:
  FakeMember(int rank, const EngineInfo& info) : rank_(rank), info_(info) {}

  EngineInfo info() const override { return info_; }
  bool lost() const override { return lost_; }

  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    shares.push_back(plan);
    if (hangs_next_step) {
      hangs_next_step = false;
      return WaitForGroup("AllToAll #3 for rank 1");
    }
    if (!next_error.ok()) return std::exchange(next_error, absl::OkStatus());
    StepResult result;
    for (const SequenceStep& s : plan.sequences) {
      if (s.sample) result.sampled.push_back(100 * rank_ + s.num_tokens);
    }
    return result;
  }
  absl::Status Join(const GroupSpec& group, absl::Time) override {
    groups.push_back(group);
    if (hangs_next_join) {
      hangs_next_join = false;
      return WaitForGroup("Join for rank 1");
    }
    return std::exchange(next_join_error, absl::OkStatus());
  }
  void AbortGroup(const absl::Status& why) override {
    absl::MutexLock lock(&mutex_);
    abort_ = why;
  }
  std::string waiting_in() const override {
    absl::MutexLock lock(&mutex_);
    return waiting_in_;
  }
  std::string address() const override { return absl::StrCat("host", rank_, ":1"); }
  absl::StatusOr<std::string> MakeUniqueId() override {
    return rank_ == 0 ? absl::StrCat("id", groups.size()) : "of another rank";
  }

  void lose() { lost_ = true; }

  // For the test's thread, between steps.
  std::vector<StepPlan> shares;
  std::vector<GroupSpec> groups;
  absl::Status next_error, next_join_error;
  bool hangs_next_step = false, hangs_next_join = false;

 private:
  absl::Status WaitForGroup(const std::string& call) {
    absl::MutexLock lock(&mutex_);
    waiting_in_ = call;
    const auto aborted = [this] { return !abort_.ok(); };
    mutex_.Await(absl::Condition(&aborted));
    waiting_in_.clear();
    return absl::UnavailableError(
        absl::StrCat("aborted: ", std::exchange(abort_, absl::OkStatus()).message()));
  }

  const int rank_;
  const EngineInfo info_;
  std::atomic<bool> lost_ = false;
  mutable absl::Mutex mutex_;
  std::string waiting_in_;
  absl::Status abort_;  // until it has ended something
};

const EngineInfo kInfo = {.num_blocks = 10,
                          .num_dp_ranks = 1,
                          .max_step_tokens = 100,
                          .max_sequences = 8,
                          .max_model_len = 50,
                          .vocab_size = 1000};

class LocalGroupTest : public ::testing::Test {
 protected:
  absl::Status Make(int num_ranks, const LocalGroupOptions& options = {}) {
    std::vector<std::unique_ptr<GroupMember>> members;
    members_.clear();
    for (int rank = 0; rank < num_ranks; ++rank) {
      auto member = std::make_unique<FakeMember>(rank, kInfo);
      members_.push_back(member.get());
      if (prepare_) prepare_(rank, member.get());
      members.push_back(std::move(member));
    }
    auto group = LocalGroup::Create(std::move(members), options);
    if (group.ok()) group_ = *std::move(group);
    return group.status();
  }

  // Sequences of 1, 2, ... tokens, one for each of `ranks`, all sampled.
  static StepPlan Plan(const std::vector<int32_t>& ranks) {
    StepPlan plan;
    for (int32_t rank : ranks) {
      SequenceStep& s = plan.sequences.emplace_back();
      s.id = plan.sequences.size();
      s.dp_rank = rank;
      s.num_tokens = static_cast<int32_t>(plan.sequences.size());
      s.num_blocks = 1;
      s.sample = true;
      plan.tokens.resize(plan.tokens.size() + s.num_tokens);
      plan.blocks.push_back(0);
    }
    return plan;
  }
  std::string ErrorOf(const StepPlan& plan) { return group_->Execute(plan).status().ToString(); }

  std::function<void(int, FakeMember*)> prepare_;
  std::vector<FakeMember*> members_;  // group_'s
  std::unique_ptr<LocalGroup> group_;
};

TEST_F(LocalGroupTest, EveryRankRunsEveryStepAndResultsAreInPlanOrder) {
  ASSERT_TRUE(Make(4).ok());
  for (int step = 0; step < 50; ++step) {
    auto result = group_->Execute(Plan({2, 0, 2, 3}));
    ASSERT_TRUE(result.ok()) << result.status();
    EXPECT_EQ(result->sampled, (std::vector<TokenId>{201, 2, 203, 304}));
  }
  for (FakeMember* member : members_) {
    ASSERT_EQ(member->shares.size(), 50u);
    EXPECT_EQ(member->shares.back().shape.num_tokens, 4);
  }
  EXPECT_TRUE(members_[1]->shares.back().empty());
  ASSERT_TRUE(group_->Execute({}).ok());
  EXPECT_EQ(members_[1]->shares.size(), 51u);
}

TEST_F(LocalGroupTest, FormsTheGroupOnceFromAddressesAndRankZerosId) {
  ASSERT_TRUE(Make(3).ok());
  ASSERT_TRUE(group_->Execute(Plan({0})).ok());
  for (int rank = 0; rank < 3; ++rank) {
    ASSERT_EQ(members_[rank]->groups.size(), 1u);
    const GroupSpec& group = members_[rank]->groups[0];
    EXPECT_EQ(group.rank, rank);
    EXPECT_EQ(group.world_size, 3);
    EXPECT_EQ(group.addresses, (std::vector<std::string>{"host0:1", "host1:1", "host2:1"}));
    EXPECT_EQ(group.nccl_unique_id, "id0");
  }
}

TEST_F(LocalGroupTest, InfoIsOfOneReplicaAndTheLeastOfAll) {
  std::vector<std::unique_ptr<GroupMember>> members;
  EngineInfo other = kInfo;
  other.num_blocks = 7;
  other.max_sequences = 5;
  EngineInfo third = kInfo;
  third.max_step_tokens = 60;
  third.max_model_len = 40;
  members.push_back(std::make_unique<FakeMember>(0, kInfo));
  members.push_back(std::make_unique<FakeMember>(1, other));
  members.push_back(std::make_unique<FakeMember>(2, third));
  auto group = LocalGroup::Create(std::move(members));
  ASSERT_TRUE(group.ok());
  const EngineInfo info = (*group)->info();
  EXPECT_EQ(info.num_dp_ranks, 3);
  EXPECT_EQ(info.num_blocks, 7);
  EXPECT_EQ(info.max_sequences, 5);
  EXPECT_EQ(info.max_step_tokens, 60);
  EXPECT_EQ(info.max_model_len, 40);
  EXPECT_EQ(info.vocab_size, 1000);
}

TEST_F(LocalGroupTest, RefusesNoRanksAndOtherModels) {
  EXPECT_TRUE(absl::IsInvalidArgument(LocalGroup::Create({}).status()));
  std::vector<std::unique_ptr<GroupMember>> members;
  EngineInfo other = kInfo;
  other.vocab_size = 5;
  members.push_back(std::make_unique<FakeMember>(0, kInfo));
  members.push_back(std::make_unique<FakeMember>(1, other));
  const absl::Status status = LocalGroup::Create(std::move(members)).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 1"));
}

TEST_F(LocalGroupTest, RefusesPlansThatCannotBeSplitAndAsksNobody) {
  ASSERT_TRUE(Make(2).ok());
  StepPlan plan = Plan({0, 1});
  plan.sequences[1].dp_rank = 2;
  EXPECT_THAT(ErrorOf(plan), HasSubstr("dp_rank 2 of 2"));
  plan = Plan({0, 1});
  plan.tokens.pop_back();
  EXPECT_THAT(ErrorOf(plan), HasSubstr("INVALID_ARGUMENT"));
  EXPECT_TRUE(members_[0]->shares.empty());
  EXPECT_TRUE(group_->Execute(Plan({0, 1})).ok());
  EXPECT_EQ(members_[0]->groups.size(), 1u) << "a refused plan is no error of the group";
}

TEST_F(LocalGroupTest, AnErrorNamesItsRankNotThoseThatFollowFromIt) {
  ASSERT_TRUE(Make(4).ok());
  members_[0]->next_error = absl::UnavailableError("rank 2 has left");
  members_[2]->next_error = absl::InternalError("sequence 9: logits");
  members_[3]->next_error = absl::InvalidArgumentError("later");
  auto result = group_->Execute(Plan({0, 1}));
  EXPECT_EQ(result.status(), absl::InternalError("rank 2: sequence 9: logits"));
  members_[1]->next_error = absl::UnavailableError("gone");
  members_[3]->next_error = absl::UnavailableError("gone too");
  EXPECT_EQ(group_->Execute(Plan({0})).status(), absl::UnavailableError("rank 1: gone"));
}

TEST_F(LocalGroupTest, FormsTheGroupAnewAfterAnError) {
  ASSERT_TRUE(Make(3).ok());
  members_[1]->next_error = absl::UnavailableError("gone");
  EXPECT_FALSE(group_->Execute(Plan({0})).ok());
  // At the first try a rank cannot join.
  members_[2]->next_join_error = absl::DeadlineExceededError("Join for rank 1");
  EXPECT_EQ(group_->Execute(Plan({0})).status(),
            absl::DeadlineExceededError("rank 2: Join for rank 1"));
  EXPECT_EQ(members_[0]->shares.size(), 1u) << "no step without a group";
  auto result = group_->Execute(Plan({2}));
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->sampled, (std::vector<TokenId>{201}));
  ASSERT_EQ(members_[0]->groups.size(), 3u);
  EXPECT_LT(members_[0]->groups[0].epoch, members_[0]->groups[1].epoch);
  EXPECT_LT(members_[0]->groups[1].epoch, members_[0]->groups[2].epoch);
  EXPECT_EQ(members_[0]->groups[2].nccl_unique_id, "id2");
}

TEST_F(LocalGroupTest, AStepThatHangsSaysWhoWaitsInWhat) {
  ASSERT_TRUE(Make(3, {.step_timeout = absl::Milliseconds(400)}).ok());
  members_[0]->hangs_next_step = members_[2]->hangs_next_step = true;
  const absl::Status status = group_->Execute(Plan({0, 1, 2})).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("rank 0 waits in AllToAll #3"),
                                                   HasSubstr("rank 2 waits in AllToAll #3")));
  EXPECT_THAT(std::string(status.message()), ::testing::Not(HasSubstr("rank 1 waits")));
  auto result = group_->Execute(Plan({0, 1, 2}));
  EXPECT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(members_[0]->groups.size(), 2u);
}

TEST_F(LocalGroupTest, AFormingThatHangsIsAnErrorOfCreate) {
  prepare_ = [](int rank, FakeMember* member) { member->hangs_next_join = rank == 0; };
  const absl::Status status = Make(2, {.join_timeout = absl::Milliseconds(400)});
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), HasSubstr("rank 0 waits in Join"));
}

TEST_F(LocalGroupTest, IsLostWhenARankIs) {
  ASSERT_TRUE(Make(2).ok());
  EXPECT_FALSE(group_->lost());
  members_[1]->lose();
  EXPECT_TRUE(group_->lost());
}

}  // namespace
}  // namespace latentd
