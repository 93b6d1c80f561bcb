// The CPU engine as one rank of a group: how it joins, what it computes, and how it fails without
// leaving its peers to hang.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <thread>

#include "engine/cpu/cpu_engine.h"
#include "engine/cpu/local_transport.h"
#include "engine/cpu/tcp_transport.h"
#include "engine/local_group.h"
#include "engine/plan_split.h"
#include "tests/engine/cpu/group_harness.h"

namespace latentd {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr char kVariants[] = "tests/golden/variants/";

// 8 experts, 3 a token.
const LoadedModel& Tiny() {
  static const LoadedModel* model = new LoadedModel(LoadModel(std::string(kVariants) + "base"));
  return *model;
}

CpuEngineOptions Options(int rank, int world_size) {
  return {.num_threads = 1,
          .num_blocks = 8,
          .max_step_tokens = 100,
          .max_sequences = 6,
          .max_model_len = 120,
          .placement = {.rank = rank, .world_size = world_size}};
}

using Members = std::vector<std::unique_ptr<GroupMember>>;

// Ranks that are threads, or that meet as processes do.
class CpuGroupTest : public ::testing::TestWithParam<std::string> {
 protected:
  std::vector<std::unique_ptr<GroupTransport>> MakeTransports(
      int world_size, absl::Duration call_timeout = absl::Minutes(1)) const {
    if (GetParam() == "local") return MakeLocalTransports(world_size, call_timeout);
    std::vector<std::unique_ptr<GroupTransport>> transports;
    for (int rank = 0; rank < world_size; ++rank) {
      auto transport = MakeTcpTransport({.call_timeout = call_timeout});
      EXPECT_TRUE(transport.ok()) << transport.status();
      transports.push_back(*std::move(transport));
    }
    return transports;
  }

  Members MakeMembers(int world_size, const LoadedModel& model = Tiny(),
                      absl::Duration call_timeout = absl::Minutes(1)) const {
    auto transports = MakeTransports(world_size, call_timeout);
    Members members;
    for (int rank = 0; rank < world_size; ++rank) {
      auto engine = CpuEngine::Create(model.config, model.weights, Options(rank, world_size),
                                      std::move(transports[rank]));
      EXPECT_TRUE(engine.ok()) << engine.status();
      members.push_back(*std::move(engine));
    }
    return members;
  }
};

GroupSpec MakeSpec(const Members& members, int64_t epoch, int rank) {
  GroupSpec group;
  group.epoch = epoch;
  group.rank = rank;
  group.world_size = static_cast<int32_t>(members.size());
  for (const auto& member : members) group.addresses.push_back(member->address());
  return group;
}

std::vector<absl::Status> JoinAll(const Members& members, int64_t epoch) {
  std::vector<absl::Status> statuses(members.size());
  OnEachRank(static_cast<int>(members.size()), [&](int rank) {
    statuses[rank] =
        members[rank]->Join(MakeSpec(members, epoch, rank), absl::Now() + absl::Minutes(1));
  });
  return statuses;
}

// A step of sequences of `num_tokens` each, the i-th on rank i % num_ranks, all sampled.
StepPlan MakePlan(const std::vector<int>& num_tokens, int num_ranks, float temperature = 0) {
  StepPlan plan;
  std::vector<BlockId> next_block(num_ranks, 0);
  for (size_t i = 0; i < num_tokens.size(); ++i) {
    SequenceStep& s = plan.sequences.emplace_back();
    s.id = 100 + i;
    s.dp_rank = static_cast<int32_t>(i % num_ranks);
    s.num_tokens = num_tokens[i];
    s.num_blocks = (num_tokens[i] + kBlockSize - 1) / kBlockSize;
    s.sample = true;
    s.sampling = {.temperature = temperature, .seed = i};
    for (int t = 0; t < num_tokens[i]; ++t) {
      plan.tokens.push_back(static_cast<TokenId>((i * 31 + t * 7 + 3) % 50));
    }
    for (int b = 0; b < s.num_blocks; ++b) plan.blocks.push_back(next_block[s.dp_rank]++);
  }
  return plan;
}

std::vector<absl::StatusOr<StepResult>> ExecuteAll(const Members& members,
                                                   std::vector<StepPlan> shares) {
  std::vector<absl::StatusOr<StepResult>> results(members.size());
  OnEachRank(static_cast<int>(members.size()),
             [&](int rank) { results[rank] = members[rank]->Execute(shares[rank]); });
  return results;
}
std::vector<StepPlan> Shares(const StepPlan& plan, int num_ranks) {
  std::vector<StepPlan> shares;
  SplitPlan(plan, num_ranks, &shares);
  return shares;
}

TEST_P(CpuGroupTest, DrawsTheTokensOfTheEngineThatIsAlone) {
  const std::vector<int> num_tokens = {70, 3, 1, 1, 12};
  for (float temperature : {0.0f, 1.5f}) {
    auto alone = CpuEngine::Create(Tiny().config, Tiny().weights, Options(0, 1));
    ASSERT_TRUE(alone.ok());
    auto expected = (*alone)->Execute(MakePlan(num_tokens, 1, temperature));
    ASSERT_TRUE(expected.ok()) << expected.status();
    for (int n : {1, 2, 3, 8, 11}) {
      auto group = LocalGroup::Create(MakeMembers(n));
      ASSERT_TRUE(group.ok()) << group.status();
      for (int step = 0; step < 3; ++step) {
        auto result = (*group)->Execute(MakePlan(num_tokens, n, temperature));
        ASSERT_TRUE(result.ok()) << result.status();
        EXPECT_EQ(result->sampled, expected->sampled) << n << " ranks";
      }
      EXPECT_TRUE((*group)->Execute({}).ok());
    }
  }
}

// Chunks, preemptions, cancels, ranks that are empty: group_invariance_test.cc for a tiny model.
TEST_P(CpuGroupTest, DrawsTheSameTokensUnderRandomLoad) {
  const SchedulerConfig scheduler = {.max_step_tokens = 40, .max_running = 5};
  const auto load = RandomLoad(3, 30, Tiny().config.vocab_size, 80, 40);
  auto alone = CpuEngine::Create(Tiny().config, Tiny().weights, Options(0, 1));
  ASSERT_TRUE(alone.ok());
  const LoadReport expected = RunLoad(load, scheduler, alone->get());
  for (int n : {2, 5}) {
    auto group = LocalGroup::Create(MakeMembers(n));
    ASSERT_TRUE(group.ok()) << group.status();
    const LoadReport report = RunLoad(load, scheduler, group->get());
    EXPECT_EQ(TokensThatDiffer(load, expected, report), "");
    EXPECT_GT(report.num_mixed, 0);
    EXPECT_GT(report.num_with_idle, 0);
  }
}

TEST_P(CpuGroupTest, IsInNoGroupUntilItHasJoined) {
  auto members = MakeMembers(2);
  const std::vector<StepPlan> shares = Shares(MakePlan({4}, 2), 2);
  for (const auto& result : ExecuteAll(members, shares)) {
    EXPECT_EQ(result.status().code(), absl::StatusCode::kFailedPrecondition);
  }
  for (const absl::Status& status : JoinAll(members, 1)) EXPECT_TRUE(status.ok()) << status;
  for (const auto& result : ExecuteAll(members, shares)) EXPECT_TRUE(result.ok());
  EXPECT_EQ(members[0]->transport(), GetParam());
  EXPECT_EQ(members[1]->waiting_in(), "");
}

TEST_P(CpuGroupTest, JoinRefusesAnotherPlaceAndSaysWhoIsMissing) {
  auto members = MakeMembers(3);
  absl::Status status = members[1]->Join(MakeSpec(members, 1, 2), absl::InfiniteFuture());
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  status = members[1]->Join(MakeSpec(members, 1, 1), absl::Now() + absl::Milliseconds(50));
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(std::string(status.message()), HasSubstr("ranks 0, 2"));
  // The next forming is another one.
  for (const absl::Status& joined : JoinAll(members, 2)) EXPECT_TRUE(joined.ok()) << joined;
}

TEST_P(CpuGroupTest, AbortGroupEndsAJoin) {
  auto members = MakeMembers(2);
  absl::Status status;
  std::thread joiner(
      [&] { status = members[0]->Join(MakeSpec(members, 1, 0), absl::Now() + absl::Minutes(5)); });
  while (members[0]->waiting_in().empty()) std::this_thread::yield();
  EXPECT_THAT(members[0]->waiting_in(), AllOf(HasSubstr("Join"), HasSubstr("rank 1")));
  members[0]->AbortGroup(absl::UnavailableError("the leader said so"));
  joiner.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(status.message()), HasSubstr("the leader said so"));
}

TEST_P(CpuGroupTest, AbortGroupEndsAStepAndTheGroupUntilTheNextJoin) {
  auto members = MakeMembers(3);
  JoinAll(members, 1);
  const std::vector<StepPlan> shares = Shares(MakePlan({4, 4, 4}, 3), 3);
  // Rank 2 does not come.
  std::vector<absl::StatusOr<StepResult>> results(2);
  std::thread aborter([&] {
    const std::string waits = "AllGather #1 for rank 2";
    while (members[0]->waiting_in() != waits || members[1]->waiting_in() != waits) {
      std::this_thread::yield();
    }
    members[0]->AbortGroup(absl::DeadlineExceededError("step 7 took too long"));
  });
  OnEachRank(2, [&](int rank) { results[rank] = members[rank]->Execute(shares[rank]); });
  aborter.join();
  for (const auto& result : results) {
    EXPECT_EQ(result.status().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(result.status().message()),
                AllOf(HasSubstr("rank 2"), HasSubstr("step 7 took too long")));
  }
  for (int rank : {0, 1}) {
    EXPECT_EQ(members[rank]->Execute(shares[rank]).status().code(),
              absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(members[rank]->waiting_in(), "");
  }
  for (const absl::Status& status : JoinAll(members, 2)) ASSERT_TRUE(status.ok()) << status;
  for (const auto& result : ExecuteAll(members, shares)) EXPECT_TRUE(result.ok());
}

// A rank that runs another number of collectives, or none, is an error that names it.
TEST_P(CpuGroupTest, ARankThatReturnsEarlyIsNamed) {
  auto members = MakeMembers(3, Tiny(), absl::Seconds(1));
  JoinAll(members, 1);
  std::vector<StepPlan> shares = Shares(MakePlan({4, 4, 4}, 3), 3);
  shares[1] = StepPlan();  // as if all had nothing to do: no collective
  const auto results = ExecuteAll(members, shares);
  EXPECT_TRUE(results[1].ok());
  for (int rank : {0, 2}) {
    EXPECT_EQ(results[rank].status().code(), absl::StatusCode::kDeadlineExceeded);
    EXPECT_THAT(std::string(results[rank].status().message()),
                AllOf(HasSubstr("AllGather #1"), HasSubstr("rank 1")));
  }
}

TEST_P(CpuGroupTest, ARefusedPlanCostsThePeersNothing) {
  auto members = MakeMembers(3);
  JoinAll(members, 1);
  const std::vector<StepPlan> shares = Shares(MakePlan({4, 70, 4}, 3), 3);
  const auto expected = ExecuteAll(members, shares);
  std::vector<StepPlan> wrong = shares;
  wrong[1].tokens[5] = 1 << 20;
  const auto results = ExecuteAll(members, wrong);
  EXPECT_EQ(results[1].status().code(), absl::StatusCode::kInvalidArgument);
  for (int rank : {0, 2}) {
    ASSERT_TRUE(results[rank].ok()) << results[rank].status();
    EXPECT_EQ(results[rank]->sampled, expected[rank]->sampled);
  }
  // A sequence of another rank, too.
  wrong = shares;
  wrong[0].sequences[0].dp_rank = 1;
  EXPECT_THAT(std::string(ExecuteAll(members, wrong)[0].status().message()),
              HasSubstr("only 0 is here"));
  for (const auto& result : ExecuteAll(members, shares)) EXPECT_TRUE(result.ok());
}

TEST_P(CpuGroupTest, AShapeThatCannotBeEndsTheGroup) {
  for (int32_t num_tokens : {3, -1, 101, 1 << 30}) {
    auto members = MakeMembers(2);
    JoinAll(members, 1);
    std::vector<StepPlan> shares = Shares(MakePlan({4, 4}, 2), 2);
    shares[1].shape.num_tokens = num_tokens;
    const auto results = ExecuteAll(members, shares);
    EXPECT_EQ(results[1].status().code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(results[0].status().code(), absl::StatusCode::kUnavailable);
    EXPECT_THAT(std::string(results[0].status().message()), HasSubstr("shape.num_tokens"));
    EXPECT_EQ(members[1]->Execute(shares[0]).status().code(),
              absl::StatusCode::kFailedPrecondition);
  }
}

// Two ranks that have other ideas of the step's shape are told, whatever they exchange.
TEST_P(CpuGroupTest, ShapesThatDifferAreAnErrorForAll) {
  auto members = MakeMembers(2);
  JoinAll(members, 1);
  std::vector<StepPlan> shares = Shares(MakePlan({4, 4}, 2), 2);
  shares[1].shape.num_tokens = 5;
  for (const auto& result : ExecuteAll(members, shares)) {
    EXPECT_EQ(result.status().code(), absl::StatusCode::kInternal);
  }
}

// Logits of one sequence that are not finite: the collectives are done, the peers have their
// tokens.
TEST_P(CpuGroupTest, ASequenceThatCannotBeSampledCostsThePeersNothing) {
  LoadedModel model = Tiny();
  const auto bytes = model.weights.embed_tokens.num_bytes();
  std::vector<std::byte> embedding(model.weights.embed_tokens.data,
                                   model.weights.embed_tokens.data + bytes);
  const size_t row_bytes = bytes / model.config.vocab_size;
  std::fill_n(embedding.begin() + 45 * row_bytes, row_bytes, std::byte{0xff});  // NaN
  model.weights.embed_tokens.data = embedding.data();
  auto members = MakeMembers(2, model);
  JoinAll(members, 1);
  std::vector<StepPlan> shares = Shares(MakePlan({4, 4}, 2), 2);
  const auto expected = ExecuteAll(members, shares);
  shares[0].tokens[1] = 45;
  const auto results = ExecuteAll(members, shares);
  EXPECT_EQ(results[0].status().code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(results[0].status().message()), HasSubstr("sequence 100"));
  ASSERT_TRUE(results[1].ok()) << results[1].status();
  EXPECT_EQ(results[1]->sampled, expected[1]->sampled);
}

TEST_P(CpuGroupTest, HoldsItsOwnExpertsAndRefusesWeightsWithoutThem) {
  const std::filesystem::path dir = std::string(kVariants) + "base";
  const Placement second{.rank = 1, .world_size = 2};
  const auto weights = LoadWeights(Tiny().config, dir, LoadFormat::kSafetensors, nullptr, second);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_LT(CpuModel::NumBytes(Tiny().config, *weights, 120, second),
            CpuModel::NumBytes(Tiny().config, Tiny().weights, 120));
  EXPECT_EQ(CpuModel::NumBytes(Tiny().config, *weights, 120, second),
            CpuModel::NumBytes(Tiny().config, Tiny().weights, 120, second));
  EXPECT_TRUE(
      CpuEngine::Create(Tiny().config, *weights, Options(1, 2), std::move(MakeTransports(2)[1]))
          .ok());
  const auto engine =
      CpuEngine::Create(Tiny().config, *weights, Options(0, 2), std::move(MakeTransports(2)[0]));
  EXPECT_EQ(engine.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(engine.status().message()), HasSubstr("expert 0 are not loaded"));
}

TEST_P(CpuGroupTest, RefusesWrongPlacements) {
  const auto create = [&](int rank, int world_size, std::unique_ptr<GroupTransport> transport) {
    return CpuEngine::Create(Tiny().config, Tiny().weights, Options(rank, world_size),
                             std::move(transport))
        .status()
        .code();
  };
  const auto transport = [&] { return std::move(MakeTransports(1)[0]); };
  EXPECT_EQ(create(2, 2, transport()), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create(-1, 2, transport()), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create(0, 0, transport()), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(create(0, 2, nullptr), absl::StatusCode::kInvalidArgument);
}

TEST(CpuEngineAloneTest, JoinsNoGroup) {
  auto engine = CpuEngine::Create(Tiny().config, Tiny().weights, Options(0, 1));
  ASSERT_TRUE(engine.ok());
  EXPECT_EQ((*engine)->Join({}, absl::InfiniteFuture()).code(),
            absl::StatusCode::kFailedPrecondition);
  (*engine)->AbortGroup(absl::UnavailableError("nobody"));
  EXPECT_TRUE((*engine)->Execute(MakePlan({4}, 1)).ok());
}

INSTANTIATE_TEST_SUITE_P(, CpuGroupTest, ::testing::Values("local", "tcp"),
                         [](const auto& info) { return info.param; });

}  // namespace
}  // namespace latentd
