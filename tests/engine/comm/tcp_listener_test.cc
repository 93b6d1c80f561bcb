// Forming TCP groups among strangers, late ranks, other groups, aborts.

#include "engine/comm/tcp_listener.h"

#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/comm/socket.h"
#include "engine/comm/tcp_forming.h"
#include "engine/comm/tcp_wire.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/comm/harness.h"
#include "tests/engine/comm/tcp_harness.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

int NumOpenFiles() {
  int n = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    n += entry.path().empty() ? 0 : 1;
  }
  return n;
}

TEST(HostPortTest, ReadsWhatItWrites) {
  for (const std::string text :
       {"10.0.0.1:7001", "[::1]:80", "rank-3.pods.local:1", ":0", "[fe80::1%eth0]:5"}) {
    const absl::StatusOr<HostPort> parsed = ParseHostPort(text);
    ASSERT_TRUE(parsed.ok()) << parsed.status();
    EXPECT_EQ(HostPortText(*parsed), text);
  }
  EXPECT_EQ(ParseHostPort("[::1]:80")->host, "::1");
  for (const std::string text : {"", "host", "host:", "host:x", "host:65536", "host:-1", "::1:80",
                                 "[::1:80", "::1]:80", "a:b:1"}) {
    EXPECT_EQ(ParseHostPort(text).status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

TEST(TcpListenerTest, SaysHowPeersReachIt) {
  EXPECT_THAT((*TcpListener::Listen({}))->address(), ::testing::StartsWith("127.0.0.1:"));
  EXPECT_THAT((*TcpListener::Listen({.listen = "localhost:0"}))->address(),
              ::testing::StartsWith("localhost:"));
  EXPECT_THAT((*TcpListener::Listen({.listen = "0.0.0.0:0"}))->address(),
              ::testing::MatchesRegex(":[1-9][0-9]*"));
  EXPECT_THAT(
      (*TcpListener::Listen({.listen = "0.0.0.0:0", .advertised_host = "node-1"}))->address(),
      ::testing::StartsWith("node-1:"));
  const auto first = TcpListener::Listen({});
  EXPECT_EQ(TcpListener::Listen({.listen = (*first)->address()}).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(TcpListener::Listen({.listen = "here"}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(TcpListenerTest, HostNamesAndEveryKindOfAddressWork) {
  Ranks names(3, {.listen = "localhost:0"});
  names.ExpectGroupWorks(1);
  if (TcpListener::Listen({.listen = "[::1]:0"}).ok()) {
    Ranks v6(3, {.listen = "[::1]:0"});
    EXPECT_THAT(v6.addresses[0], ::testing::StartsWith("[::1]:"));
    v6.ExpectGroupWorks(1);
  }
  Ranks everywhere(2, {.listen = ":0", .advertised_host = "127.0.0.1"});
  everywhere.ExpectGroupWorks(1);
}

TEST(TcpListenerTest, ManyGroupsOneAfterAnotherLeaveNothingBehind) {
  Ranks ranks(4);
  ranks.ExpectGroupWorks(0);
  const int before = NumOpenFiles();
  for (int epoch = 1; epoch <= 60; ++epoch) {
    if (epoch % 3 == 0) {  // this one is given up at a random moment
      std::thread abort([&] {
        absl::SleepFor(absl::Microseconds(97 * epoch));
        ranks.listeners[epoch % 4]->Abort(epoch, absl::CancelledError("given up"));
        // Those who are connected with nobody yet hear it from the leader alone.
        absl::SleepFor(absl::Milliseconds(3));
        for (auto& listener : ranks.listeners) {
          listener->Abort(epoch, absl::CancelledError("given up"));
        }
      });
      OnRanks(4, [&](int rank) { return ranks.Join(epoch, rank).status(); });
      abort.join();
    } else {
      ranks.ExpectGroupWorks(epoch);
    }
  }
  EXPECT_EQ(NumOpenFiles(), before);
}

TEST(TcpListenerTest, EpochsMayStartAgain) {
  Ranks ranks(2);
  for (const int64_t epoch : {7, 8, 1, 2, 1}) ranks.ExpectGroupWorks(epoch);
}

TEST(TcpListenerTest, ALateRankIsWaitedFor) {
  Ranks ranks(3);
  for (int late = 0; late < 3; ++late) {
    for (const absl::Status& status : OnRanks(3, [&](int rank) {
           if (rank == late) absl::SleepFor(absl::Milliseconds(300));
           return ranks.Join(late, rank).status();
         })) {
      EXPECT_TRUE(status.ok()) << status;
    }
  }
}

TEST(TcpListenerTest, ARankThatDoesNotListenYetIsDialledAgain) {
  Ranks ranks(2);
  ranks.listeners[0].reset();  // its process has not started
  std::thread start([&] {
    absl::SleepFor(absl::Milliseconds(300));
    ranks.listeners[0] = *TcpListener::Listen({.listen = ranks.addresses[0]});
    EXPECT_TRUE(ranks.Join(1, 0).ok());
  });
  EXPECT_TRUE(ranks.Join(1, 1).ok());
  start.join();
}

TEST(TcpListenerTest, JoinSaysWhoIsMissingAndWhy) {
  Ranks ranks(4);
  ranks.listeners[0].reset();
  const Joined joined = ranks.Join(5, 2, absl::Milliseconds(500));
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(joined.status().message(), HasSubstr("Join #5 for ranks 0, 1, 3: not there in time"));
  EXPECT_THAT(joined.status().message(),
              HasSubstr(absl::StrCat("rank 0 at ", ranks.addresses[0], ": Connection refused")));
  EXPECT_THAT(joined.status().message(),
              HasSubstr(absl::StrCat("rank 1 at ", ranks.addresses[1], ": no answer")));
  EXPECT_EQ(ranks.listeners[2]->waiting_in(), "");
}

TEST(TcpListenerTest, AHostNameThatNobodyKnowsIsNamed) {
  Ranks ranks(2);
  ranks.addresses[0] = "no-such-host.invalid:7";
  const Joined joined = ranks.Join(1, 1, absl::Milliseconds(500));
  EXPECT_EQ(joined.status().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_THAT(joined.status().message(), HasSubstr("no-such-host.invalid:7"));
}

TEST(TcpListenerTest, RanksOfOtherGroupsDoNotMeet) {
  Ranks ranks(2);
  std::vector<absl::Status> statuses =
      OnRanks(2, [&](int rank) { return ranks.Join(4 + rank, rank, absl::Seconds(1)).status(); });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
  EXPECT_EQ(statuses[1].code(), absl::StatusCode::kDeadlineExceeded) << statuses[1];
  // The same epoch of another leader: other addresses.
  statuses = OnRanks(2, [&](int rank) {
    std::vector<std::string> addresses = ranks.addresses;
    if (rank == 1) addresses[1] = "127.0.0.1:1";
    return ranks.listeners[rank]->Join(6, rank, addresses, absl::Now() + absl::Seconds(1)).status();
  });
  EXPECT_EQ(statuses[0].code(), absl::StatusCode::kDeadlineExceeded) << statuses[0];
  EXPECT_THAT(statuses[1].message(), HasSubstr("it is in another group, 6"));
  ranks.ExpectGroupWorks(7);
}

TEST(TcpListenerTest, ARankThatIsInAnOlderGroupIsWaitedFor) {
  Ranks ranks(2);
  const std::vector<absl::Status> statuses = OnRanks(2, [&](int rank) {
    if (rank == 0) {
      EXPECT_FALSE(ranks.Join(1, 0, absl::Milliseconds(300)).ok());
    }
    return ranks.Join(2, rank).status();
  });
  EXPECT_TRUE(statuses[0].ok()) << statuses[0];
  EXPECT_TRUE(statuses[1].ok()) << statuses[1];
}

TEST(TcpListenerTest, AnAbortEndsAJoinHereAndOnThePeers) {
  Ranks ranks(4);
  std::thread abort([&] {
    // Ranks 0 to 2 are connected; rank 3 never comes.
    EXPECT_TRUE(Eventually([&] {
      for (int rank = 0; rank < 3; ++rank) {
        if (ranks.listeners[rank]->waiting_in() != "Join #3 for rank 3") return false;
      }
      return true;
    }));
    ranks.listeners[1]->Abort(3, absl::CancelledError("rank 3 has died"));
  });
  for (const absl::Status& status :
       OnRanks(3, [&](int rank) { return ranks.Join(3, rank).status(); })) {
    EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
    EXPECT_THAT(status.message(), HasSubstr("Join #3 for rank 3: "));
    EXPECT_THAT(status.message(), HasSubstr("aborted: rank 3 has died"));
  }
  abort.join();
  ranks.ExpectGroupWorks(4);
}

TEST(TcpListenerTest, AnAbortBeforeItsJoinCountsAndNoOthers) {
  Ranks ranks(2);
  ranks.listeners[0]->Abort(2, absl::CancelledError("early"));
  ranks.ExpectGroupWorks(1);
  const absl::Status status = ranks.Join(2, 0).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(status.message(), HasSubstr("early"));
  ranks.ExpectGroupWorks(2);  // another leader's
}

TEST(TcpListenerTest, StrangersDoNotDisturb) {
  Ranks ranks(2);
  const uint64_t token = GroupToken(ranks.addresses);
  Hello good{.epoch = 9, .token = token, .from = 1, .to = 0};
  std::vector<Hello> hellos(8, good);
  hellos[0].magic ^= 1;
  hellos[1].version = kWireVersion + 1;
  hellos[2].epoch = 8;
  hellos[3].token ^= 1;
  hellos[4].from = 0;
  hellos[5].from = 1000000;
  hellos[6].to = 1;
  hellos[7].channel = static_cast<Channel>(7);
  std::vector<Socket> strangers;
  for (int i = 0; i < 300; ++i) strangers.push_back(Dial(ranks.addresses[0]));  // say nothing
  for (int i = 0; i < 20; ++i) Dial(ranks.addresses[0]);                        // and leave
  strangers.push_back(Dial(ranks.addresses[0]));
  SendText(strangers.back(), "GET / HTTP/1.1\r\nHost: here\r\n\r\n" + std::string(5000, 'x'));
  strangers.push_back(Dial(ranks.addresses[0]));
  SendText(strangers.back(), "half a h");
  std::vector<Socket> impostors;
  for (const Hello& hello : hellos) {
    impostors.push_back(Dial(ranks.addresses[0]));
    SendBytes(impostors.back(), hello);
  }
  std::thread join([&] { EXPECT_TRUE(ranks.Join(9, 0).ok()); });
  for (size_t i = 0; i < impostors.size(); ++i) {
    const std::optional<Welcome> answer = ReceiveWhole<Welcome>(impostors[i]);
    ASSERT_EQ(answer.has_value(), i != 0) << i;
    if (!answer) continue;
    EXPECT_EQ(answer->answer, i == 1 ? Answer::kOtherVersion : Answer::kOtherGroup) << i;
    char byte;
    EXPECT_LE(recv(impostors[i].fd(), &byte, 1, 0), 0) << i;  // closed
  }
  EXPECT_TRUE(ranks.Join(9, 1).ok());
  join.join();
}

TEST(TcpListenerTest, RandomHellosNeverStopAGroup) {
  std::mt19937 random(4);
  Ranks ranks(2);
  for (int64_t epoch = 1; epoch <= 30; ++epoch) {
    std::vector<Socket> strangers;
    for (int i = 0; i < 10; ++i) {
      // A good one of an older group but for some bytes: never that of the rank itself.
      Hello hello{.epoch = epoch - 1, .token = GroupToken(ranks.addresses), .from = 1, .to = 0};
      std::string bytes(reinterpret_cast<const char*>(&hello), sizeof(hello));
      for (int n = random() % 3; n > 0; --n) bytes[random() % 16] = static_cast<char>(random());
      bytes.resize(random() % 2 == 0 ? bytes.size() : random() % 100, 'x');
      strangers.push_back(Dial(ranks.addresses[0]));
      SendText(strangers.back(), bytes);
    }
    ranks.ExpectGroupWorks(epoch);
  }
}

TEST(TcpListenerTest, SomethingElseAtAPeersAddressIsSaid) {
  Socket other = *ListenOn((*Resolve({.host = "127.0.0.1", .port = "0"}, true))[0]);
  Ranks ranks(2);
  ranks.addresses[0] = SocketAddressText(*LocalAddress(other));
  std::thread serve([&] {
    Socket client;
    EXPECT_TRUE(Eventually([&] {
      client = Socket(accept(other.fd(), nullptr, nullptr));
      return client.is_open();
    }));
    SendText(client, "SSH-2.0-OpenSSH_9.2p1 and what follows\r\n");
    char byte;
    while (recv(client.fd(), &byte, 1, 0) > 0) continue;
  });
  const absl::Status status = ranks.Join(1, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << status;
  EXPECT_THAT(status.message(), HasSubstr(absl::StrCat("rank 0 at ", ranks.addresses[0],
                                                       " answers what no rank does")));
  serve.join();
}

}  // namespace
}  // namespace latentd
