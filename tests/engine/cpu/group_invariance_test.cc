// What the number of ranks changes: nothing, bit for bit. The logits of a group are those of one
// engine that is alone, whatever its model, its load and the spread of the sequences.

#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <string>
#include <utility>

#include "engine/cpu/cpu_engine.h"
#include "engine/cpu/local_transport.h"
#include "engine/cpu/tcp_transport.h"
#include "engine/local_group.h"
#include "tests/engine/cpu/group_harness.h"

namespace latentd {
namespace {

constexpr size_t kAlwaysGather = ~size_t{0};
constexpr size_t kNeverGather = 0;

// Prompts of these lengths from nothing, and the logits of all their tokens by one engine.
struct Prompts {
  std::vector<Runner::Part> parts;
  std::vector<float> expected;
};
Prompts MakePrompts(const LoadedModel& model, const std::vector<int>& lengths,
                    const RunnerOptions& options) {
  Prompts prompts;
  Runner alone(model, options);
  for (size_t i = 0; i < lengths.size(); ++i) {
    const std::vector<TokenId> tokens =
        SomeTokens(lengths[i], model.config.vocab_size, 20 + static_cast<uint32_t>(i));
    const std::vector<float> logits = alone.Prefill(tokens, options.max_step_tokens);
    prompts.expected.insert(prompts.expected.end(), logits.begin(), logits.end());
    prompts.parts.push_back({.tokens = tokens, .num_computed = 0, .blocks = {}});
  }
  return prompts;
}

// The i-th on rank rank_of(i), in the next free blocks there.
StepPlan PlanOf(const std::vector<Runner::Part>& parts, int num_ranks,
                const std::function<int(int)>& rank_of) {
  std::vector<Runner::Part> placed = parts;
  std::vector<BlockId> next(num_ranks, 0);
  for (size_t i = 0; i < placed.size(); ++i) {
    BlockId& first = next[rank_of(static_cast<int>(i))];
    placed[i].blocks = ConsecutiveBlocks(static_cast<int>(placed[i].tokens.size()), first);
    first += static_cast<BlockId>(placed[i].blocks.size());
  }
  StepPlan plan = Runner::MakePlan(placed);
  for (size_t i = 0; i < placed.size(); ++i) {
    plan.sequences[i].dp_rank = rank_of(static_cast<int>(i));
  }
  return plan;
}

// Every shape and dtype, with more ranks than experts, on all ranks and on one; both ways to
// dispatch.
TEST(GroupVariantTest, RanksChangeNothing) {
  for (const auto& entry : std::filesystem::directory_iterator("tests/golden/variants")) {
    if (!entry.is_directory()) continue;
    SCOPED_TRACE(entry.path().string());
    const LoadedModel model = LoadModel(entry.path());
    const RunnerOptions options{.num_threads = 1, .num_blocks = 8, .max_positions = 128};
    const Prompts prompts = MakePrompts(model, {20, 1, 70, 7, 3}, options);
    for (int ranks : {2, 3, 16}) {
      for (size_t gather_bytes : {kAlwaysGather, kNeverGather}) {
        GroupRunner group(model, ranks, {.runner = options, .gather_bytes = gather_bytes});
        const auto spread = [&](int i) { return (i * 5 + 1) % ranks; };
        const auto last = [&](int) { return ranks - 1; };
        EXPECT_TRUE(SameBits(group.Step(PlanOf(prompts.parts, ranks, spread)), prompts.expected))
            << ranks << " ranks";
        EXPECT_TRUE(SameBits(group.Step(PlanOf(prompts.parts, ranks, last)), prompts.expected))
            << ranks << " ranks, all sequences on one";
      }
    }
  }
}

// A rank with two tiles of tokens, others with one or none.
TEST(GroupDemoTest, TilesAreAllRanks) {
  const LoadedModel model = LoadModel(kDemoModel);
  const RunnerOptions options{.num_threads = 1, .num_blocks = 24};
  const Prompts prompts = MakePrompts(model, {515, 300, 1, 513, 2}, options);
  for (int ranks : {2, 5}) {
    GroupRunner group(model, ranks, {.runner = options});
    const StepPlan plan = PlanOf(prompts.parts, ranks, [](int i) { return i % 2; });
    EXPECT_TRUE(SameBits(group.Step(plan), prompts.expected)) << ranks << " ranks";
  }
}

// What crosses a socket is what crosses memory.
TEST(GroupDemoTest, OverTcpToo) {
  const LoadedModel model = LoadModel(kDemoModel);
  const RunnerOptions options{.num_threads = 1, .num_blocks = 8, .max_positions = 256};
  const Prompts prompts = MakePrompts(model, {150, 33, 2, 1, 1}, options);
  for (int ranks : {2, 4}) {
    for (size_t gather_bytes : {kAlwaysGather, kNeverGather}) {
      GroupRunner group(model, ranks,
                        {.runner = options, .gather_bytes = gather_bytes, .tcp = true});
      const StepPlan plan = PlanOf(prompts.parts, ranks, [&](int i) { return i % (ranks - 1); });
      EXPECT_TRUE(SameBits(group.Step(plan), prompts.expected)) << ranks << " ranks";
    }
  }
}

TEST(GroupDemoTest, QuantizedActivationsToo) {
  const LoadedModel model = LoadModel(kDemoModel);
  const RunnerOptions options{
      .num_threads = 1, .num_blocks = 8, .max_positions = 128, .quantize_activations = true};
  const Prompts prompts = MakePrompts(model, {90, 33, 2, 1}, options);
  for (int ranks : {2, 4, 16}) {
    GroupRunner group(model, ranks, {.runner = options});
    const StepPlan plan = PlanOf(prompts.parts, ranks, [&](int i) { return i % ranks; });
    EXPECT_TRUE(SameBits(group.Step(plan), prompts.expected)) << ranks << " ranks";
  }
}

TEST(GroupDemoTest, EveryKernelSet) {
  const LoadedModel model = LoadModel(kDemoModel);
  for (const Kernels* kernels : SupportedKernels()) {
    const RunnerOptions options{
        .kernels = kernels, .num_threads = 1, .num_blocks = 8, .max_positions = 128};
    const Prompts prompts = MakePrompts(model, {60, 1, 1, 12}, options);
    GroupRunner group(model, 3, {.runner = options});
    const StepPlan plan = PlanOf(prompts.parts, 3, [&](int i) { return i % 2; });
    EXPECT_TRUE(SameBits(group.Step(plan), prompts.expected)) << kernels->name;
  }
}

// Random requests through a real scheduler: they come and go at any time, are computed in chunks,
// preempted for want of blocks, served from cached prefixes; ranks are empty at times.
class GroupLoadTest : public ::testing::TestWithParam<uint64_t> {
 public:
  static constexpr uint64_t kSeed = 12;  // has prefix hits too, though blocks are few

 protected:
  static constexpr int kMaxPrompt = 150, kMaxNew = 70;
  // One for each running sequence: what grows beyond its first preempts another.
  static constexpr int kNumBlocks = 6;
  const SchedulerConfig scheduler_ = {.max_step_tokens = 48, .max_running = 6};
};

TEST_P(GroupLoadTest, LogitsAreTheSameBits) {
  const LoadedModel model = LoadModel(kDemoModel);
  const auto load = RandomLoad(GetParam(), 32, model.config.vocab_size, kMaxPrompt, kMaxNew);
  const GroupRunnerOptions options{.runner = {.num_threads = 1,
                                              .num_blocks = kNumBlocks,
                                              .max_step_tokens = 64,
                                              .max_positions = kNumBlocks * kBlockSize}};
  GroupRunner alone(model, 1, options);
  const LoadReport expected = RunLoad(load, scheduler_, &alone);
  EXPECT_GT(expected.num_preemptions, 0);
  EXPECT_GT(expected.num_cancelled, 0);
  if (GetParam() == kSeed) {
    EXPECT_GT(expected.num_cached_tokens, 200);
  }
  EXPECT_GT(expected.num_mixed, 10);
  for (int ranks : {2, 4, 8, 16}) {
    SCOPED_TRACE(ranks);
    GroupRunner group(model, ranks, options);
    const LoadReport report = RunLoad(load, scheduler_, &group);
    EXPECT_EQ(TokensThatDiffer(load, expected, report), "");
    int64_t compared = 0;
    for (const auto& [place, print] : group.prints()) {
      const auto at = alone.prints().find(place);
      if (at == alone.prints().end()) continue;
      ++compared;
      ASSERT_EQ(print, at->second) << "request " << place.first << " at " << place.second;
    }
    EXPECT_GT(compared, 300);
    if (ranks > 6) {
      EXPECT_GT(report.num_with_idle, 0);
    }
    EXPECT_GT(report.num_mixed, 0);
    if (ranks == 2) {
      EXPECT_GT(report.num_preemptions, 0);
    }
  }
}

// The same through the engine itself, its sampler included.
TEST_P(GroupLoadTest, EnginesDrawTheSameTokens) {
  const LoadedModel model = LoadModel(kDemoModel);
  const auto make_engine = [&](int rank, int ranks, std::unique_ptr<GroupTransport> transport) {
    auto engine = CpuEngine::Create(model.config, model.weights,
                                    {.num_threads = 1,
                                     .num_blocks = kNumBlocks,
                                     .max_step_tokens = 64,
                                     .max_sequences = 8,
                                     .max_model_len = kNumBlocks * kBlockSize,
                                     .placement = {.rank = rank, .world_size = ranks}},
                                    std::move(transport));
    EXPECT_TRUE(engine.ok()) << engine.status();
    return *std::move(engine);
  };
  const auto load = RandomLoad(GetParam(), 12, model.config.vocab_size, kMaxPrompt, kMaxNew);
  const LoadReport expected = RunLoad(load, scheduler_, make_engine(0, 1, nullptr).get());
  for (const auto& [ranks, tcp] : std::vector<std::pair<int, bool>>{
           {2, false}, {4, false}, {8, false}, {16, false}, {2, true}, {4, true}}) {
    SCOPED_TRACE(ranks);
    auto transports = MakeLocalTransports(ranks, absl::Minutes(2));
    std::vector<std::unique_ptr<GroupMember>> members;
    for (int rank = 0; rank < ranks; ++rank) {
      if (tcp) {
        auto transport = MakeTcpTransport({.call_timeout = absl::Minutes(2)});
        ASSERT_TRUE(transport.ok()) << transport.status();
        transports[rank] = *std::move(transport);
      }
      members.push_back(make_engine(rank, ranks, std::move(transports[rank])));
    }
    auto group = LocalGroup::Create(std::move(members));
    ASSERT_TRUE(group.ok()) << group.status();
    EXPECT_EQ((*group)->info().num_dp_ranks, ranks);
    EXPECT_EQ((*group)->info().num_blocks, kNumBlocks);
    EXPECT_EQ(TokensThatDiffer(load, expected, RunLoad(load, scheduler_, group->get())), "");
  }
}

// LATENTD_TEST_LONG=1: more loads.
std::vector<uint64_t> Seeds() {
  if (std::getenv("LATENTD_TEST_LONG") == nullptr) return {GroupLoadTest::kSeed};
  std::vector<uint64_t> seeds(20);
  std::iota(seeds.begin(), seeds.end(), 1);
  return seeds;
}

INSTANTIATE_TEST_SUITE_P(, GroupLoadTest, ::testing::ValuesIn(Seeds()),
                         [](const auto& info) { return "seed" + std::to_string(info.param); });

}  // namespace
}  // namespace latentd
