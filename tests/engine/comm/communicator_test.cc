// What every communicator must do, whatever carries it.

#include "engine/comm/communicator.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/comm/local_communicator.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/comm/harness.h"

namespace latentd {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;

enum class Kind { kLocal, kTcp };

std::string Name(Kind kind) { return kind == Kind::kLocal ? "Local" : "Tcp"; }

Group MakeGroup(Kind kind, int world_size, absl::Duration timeout = absl::Seconds(60)) {
  return kind == Kind::kLocal ? MakeLocalCommunicators(world_size, timeout)
                              : MakeTcpGroup(world_size, timeout);
}

// The four calls, each with a few bytes, for tests of what is common to them.
struct AnyCall {
  std::string name;
  std::function<absl::Status(Communicator*)> make;
};

std::vector<AnyCall> AnyCalls() {
  return {
      {"AllGather",
       [](Communicator* c) {
         std::vector<std::byte> in(3), out(3 * c->world_size());
         return c->AllGather(in, absl::MakeSpan(out));
       }},
      {"AllToAll",
       [](Communicator* c) {
         std::vector<std::byte> in(3), out(3);
         const std::vector<absl::Span<const std::byte>> to(c->world_size(), in);
         const std::vector<absl::Span<std::byte>> from(c->world_size(), absl::MakeSpan(out));
         return c->AllToAll(to, from);
       }},
      {"ReduceScatter",
       [](Communicator* c) {
         std::vector<float> in(2 * c->world_size()), out(2);
         return c->ReduceScatter(in, absl::MakeSpan(out));
       }},
      {"Barrier", [](Communicator* c) { return c->Barrier(); }},
  };
}

absl::Status Gather(Communicator* c, size_t size) {
  std::vector<std::byte> in(size), out(size * c->world_size());
  return c->AllGather(in, absl::MakeSpan(out));
}

class GroupTest : public ::testing::TestWithParam<std::tuple<Kind, int>> {
 protected:
  int world_size() const { return std::get<1>(GetParam()); }
  Group Make(absl::Duration timeout = absl::Seconds(60)) {
    return MakeGroup(std::get<0>(GetParam()), world_size(), timeout);
  }
};

TEST_P(GroupTest, RandomCallsGiveWhatTheModelSays) {
  for (uint64_t seed = 0; seed < 3; ++seed) {
    Group group = Make();
    const RandomCalls calls{.seed = seed, .num_calls = 40};
    for (const absl::Status& status : OnRanks(
             world_size(), [&](int rank) { return MakeRandomCalls(calls, group[rank].get()); })) {
      EXPECT_TRUE(status.ok()) << "seed " << seed << ": " << status;
    }
  }
}

TEST_P(GroupTest, LargeRandomCallsToo) {
  Group group = Make();
  const size_t n = world_size();
  const RandomCalls calls{
      .seed = 9, .num_calls = 6, .max_bytes = std::min<size_t>(3 << 20, (16 << 20) / (n * n))};
  for (const absl::Status& status :
       OnRanks(world_size(), [&](int rank) { return MakeRandomCalls(calls, group[rank].get()); })) {
    EXPECT_TRUE(status.ok()) << status;
  }
}

// More than any buffer of the kernel's: who sends all before it receives waits for ever.
TEST_P(GroupTest, AllSendMoreAtTheSameTimeThanIsBuffered) {
  Group group = Make();
  for (const absl::Status& status : OnRanks(world_size(), [&](int rank) {
         return Gather(group[rank].get(), (16 << 20) / world_size());
       })) {
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST_P(GroupTest, EveryRankKnowsItsPlace) {
  Group group = Make();
  ASSERT_EQ(group.size(), world_size());
  for (int rank = 0; rank < world_size(); ++rank) {
    EXPECT_EQ(group[rank]->rank(), rank);
    EXPECT_EQ(group[rank]->world_size(), world_size());
    EXPECT_EQ(group[rank]->waiting_in(), "");
  }
}

TEST_P(GroupTest, NobodyPassesABarrierBeforeTheLastHasCome) {
  Group group = Make();
  std::atomic<int> come = 0;
  for (const absl::Status& status : OnRanks(world_size(), [&](int rank) -> absl::Status {
         for (int round = 1; round <= 50; ++round) {
           ++come;
           if (absl::Status s = group[rank]->Barrier(); !s.ok()) return s;
           if (come < round * world_size()) return absl::InternalError("passed early");
           if (absl::Status s = group[rank]->Barrier(); !s.ok()) return s;
         }
         return absl::OkStatus();
       })) {
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST_P(GroupTest, AnAbortEndsWhatEveryRankWaitsIn) {
  if (world_size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  for (const AnyCall& call : AnyCalls()) {
    Group group = Make();
    std::thread abort([&] {
      EXPECT_TRUE(Eventually([&] { return group[0]->waiting_in() != ""; }));
      group[0]->Abort(absl::CancelledError("step 7 is lost"));
      group[0]->Abort(absl::CancelledError("too late"));
    });
    const int absent = world_size() - 1;
    const std::vector<absl::Status> statuses = OnRanks(absent, [&](int rank) {
      const absl::Status first = call.make(group[rank].get());
      EXPECT_EQ(call.make(group[rank].get()), first);  // final
      return first;
    });
    abort.join();
    for (int rank = 0; rank < absent; ++rank) {
      EXPECT_EQ(statuses[rank].code(), absl::StatusCode::kUnavailable) << statuses[rank];
      EXPECT_THAT(statuses[rank].message(), HasSubstr(call.name + " #1"));
      EXPECT_THAT(statuses[rank].message(), HasSubstr("step 7 is lost"));
    }
    // The rank that was computing learns of it when it comes.
    EXPECT_EQ(call.make(group[absent].get()).code(), absl::StatusCode::kUnavailable);
  }
}

TEST_P(GroupTest, ARankThatNeverComesIsNamed) {
  if (world_size() == 1) GTEST_SKIP() << "one rank waits for nobody";
  const int absent = world_size() / 2;
  for (const AnyCall& call : AnyCalls()) {
    Group group = Make(absl::Milliseconds(100));
    const std::vector<absl::Status> statuses = OnRanks(world_size(), [&](int rank) {
      return rank == absent ? absl::OkStatus() : call.make(group[rank].get());
    });
    bool timed_out = false;
    for (int rank = 0; rank < world_size(); ++rank) {
      if (rank == absent) continue;
      // The others may hear of it from the rank whose time was up first.
      timed_out |= statuses[rank].code() == absl::StatusCode::kDeadlineExceeded;
      EXPECT_FALSE(statuses[rank].ok());
      EXPECT_THAT(
          std::string(statuses[rank].message()),
          ContainsRegex(absl::StrCat(call.name, " #1 for ranks? [0-9, ]*\\b", absent, "\\b")));
    }
    EXPECT_TRUE(timed_out);
  }
}

INSTANTIATE_TEST_SUITE_P(All, GroupTest,
                         ::testing::Combine(::testing::Values(Kind::kLocal, Kind::kTcp),
                                            ::testing::Values(1, 2, 3, 8, 16)),
                         [](const auto& info) {
                           return absl::StrCat(Name(std::get<0>(info.param)),
                                               std::get<1>(info.param));
                         });

class ThreeRanksTest : public ::testing::TestWithParam<Kind> {
 protected:
  // Runs f(communicator) on the ranks, and expects that each fails with this code, there or in the
  // next call, and that one of them at least says all of `text`.
  void ExpectAllFail(absl::StatusCode code, const std::string& text,
                     const std::function<absl::Status(Communicator*)>& f) {
    Group group = MakeGroup(GetParam(), 3);
    std::string all;
    for (const absl::Status& status : OnRanks(3, [&](int rank) {
           const absl::Status first = f(group[rank].get());
           return first.ok() ? group[rank]->Barrier() : first;
         })) {
      EXPECT_EQ(status.code(), code) << status;
      absl::StrAppend(&all, status.message(), "\n");
    }
    EXPECT_THAT(all, HasSubstr(text));
  }
};

TEST_P(ThreeRanksTest, AnotherCallIsADisagreement) {
  ExpectAllFail(absl::StatusCode::kInternal, "Barrier #1",
                [](Communicator* c) { return c->rank() == 1 ? c->Barrier() : Gather(c, 8); });
}

TEST_P(ThreeRanksTest, OtherSizesAreADisagreement) {
  ExpectAllFail(absl::StatusCode::kInternal, "16 bytes",
                [](Communicator* c) { return Gather(c, c->rank() == 1 ? 16 : 8); });
  ExpectAllFail(absl::StatusCode::kInternal, "0 bytes",
                [](Communicator* c) { return Gather(c, c->rank() == 2 ? 0 : 8); });
  ExpectAllFail(absl::StatusCode::kInternal, "12 bytes", [](Communicator* c) {
    std::vector<float> in(3 * (c->rank() == 0 ? 3 : 2)), out(in.size() / 3);
    return c->ReduceScatter(in, absl::MakeSpan(out));
  });
}

TEST_P(ThreeRanksTest, AllToAllOfAPairThatDisagrees) {
  ExpectAllFail(absl::StatusCode::kInternal, "rank 1", [](Communicator* c) {
    std::vector<std::byte> in(9), out(9);
    std::vector<absl::Span<const std::byte>> to(3, absl::MakeConstSpan(in).first(4));
    const std::vector<absl::Span<std::byte>> from(3, absl::MakeSpan(out).first(4));
    if (c->rank() == 1) to[2] = in;
    return c->AllToAll(to, from);
  });
}

TEST_P(ThreeRanksTest, BuffersThatDoNotFitTheGroup) {
  ExpectAllFail(absl::StatusCode::kInternal, "do not fit", [](Communicator* c) {
    std::vector<std::byte> in(8), out(c->rank() == 1 ? 23 : 24);
    return c->AllGather(in, absl::MakeSpan(out));
  });
  ExpectAllFail(absl::StatusCode::kInternal, "do not fit", [](Communicator* c) {
    const std::vector<absl::Span<const std::byte>> to(c->rank() == 1 ? 2 : 3);
    const std::vector<absl::Span<std::byte>> from(3);
    return c->AllToAll(to, from);
  });
  ExpectAllFail(absl::StatusCode::kInternal, "do not fit", [](Communicator* c) {
    std::vector<float> in(7), out(c->rank() == 1 ? 2 : 0);
    return c->ReduceScatter(absl::MakeSpan(in).first(c->rank() == 1 ? 7 : 0), absl::MakeSpan(out));
  });
}

TEST_P(ThreeRanksTest, ARankThatLeavesEndsTheCallsOfItsPeers) {
  Group group = MakeGroup(GetParam(), 3);
  std::thread leave([&] {
    EXPECT_TRUE(Eventually([&] {
      return group[0]->waiting_in() == "Barrier #1 for rank 2" &&
             group[1]->waiting_in() == "Barrier #1 for rank 2";
    }));
    group[2].reset();
  });
  for (const absl::Status& status : OnRanks(2, [&](int rank) { return group[rank]->Barrier(); })) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(status.message(), HasSubstr("Barrier #1"));
    EXPECT_THAT(status.message(), HasSubstr("rank 2"));
  }
  leave.join();
}

TEST_P(ThreeRanksTest, ARankMayLeaveAfterItsLastCall) {
  for (int round = 0; round < 20; ++round) {
    Group group = MakeGroup(GetParam(), 3);
    for (const absl::Status& status : OnRanks(3, [&](int rank) {
           const absl::Status status = Gather(group[rank].get(), 100000);
           group[rank].reset();
           return status;
         })) {
      EXPECT_TRUE(status.ok()) << status;
    }
  }
}

TEST_P(ThreeRanksTest, AnAbortAtAnyMomentEndsARunningGroup) {
  for (int round = 0; round < 20; ++round) {
    Group group = MakeGroup(GetParam(), 3);
    std::thread abort([&] {
      absl::SleepFor(absl::Microseconds(137 * round));
      group[round % 3]->Abort(absl::CancelledError("enough"));
    });
    const RandomCalls calls{.seed = 1, .num_calls = 1000000000};
    for (const absl::Status& status :
         OnRanks(3, [&](int rank) { return MakeRandomCalls(calls, group[rank].get()); })) {
      EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
      EXPECT_THAT(status.message(), HasSubstr("enough"));
    }
    abort.join();
  }
}

TEST_P(ThreeRanksTest, WaitingInSaysForWhom) {
  Group group = MakeGroup(GetParam(), 3);
  std::thread first([&] { EXPECT_TRUE(Gather(group[1].get(), 10).ok()); });
  EXPECT_TRUE(Eventually([&] { return group[1]->waiting_in() == "AllGather #1 for ranks 0, 2"; }));
  EXPECT_EQ(group[0]->waiting_in(), "");
  std::thread second([&] { EXPECT_TRUE(Gather(group[2].get(), 10).ok()); });
  EXPECT_TRUE(Eventually([&] { return group[1]->waiting_in() == "AllGather #1 for rank 0"; }));
  EXPECT_TRUE(Gather(group[0].get(), 10).ok());
  first.join();
  second.join();
  EXPECT_EQ(group[1]->waiting_in(), "");
}

INSTANTIATE_TEST_SUITE_P(All, ThreeRanksTest, ::testing::Values(Kind::kLocal, Kind::kTcp),
                         [](const auto& info) { return Name(info.param); });

}  // namespace
}  // namespace latentd
