// Ranks in processes of their own that are killed, stopped, idle. This program is such a rank too,
// when its first argument is --rank.

#include <fcntl.h>
#include <net/if.h>
#include <poll.h>
#include <sched.h>
#include <spawn.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "engine/comm/socket.h"
#include "engine/comm/tcp_listener.h"
#include "engine/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/engine/comm/harness.h"

extern char** environ;

namespace latentd {
namespace {

using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr size_t kLarge = 12 << 20;  // more than the kernel buffers

std::string Text(const absl::Status& status) {
  return status.ok() ? "OK"
                     : absl::StrCat(absl::StatusCodeToString(status.code()), " ", status.message());
}

// Prints its address, then does what the lines of its input say and prints how each ended.
int RunRank(absl::Duration call_timeout) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  auto listener = TcpListener::Listen({.call_timeout = call_timeout});
  if (!listener.ok()) return 1;
  std::cout << (*listener)->address() << std::endl;
  std::unique_ptr<Communicator> communicator;
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    std::string verb;
    words >> verb;
    absl::Status status;
    if (verb == "join") {
      int64_t epoch = 0;
      int rank = 0;
      std::vector<std::string> addresses;
      words >> epoch >> rank;
      for (std::string address; words >> address;) addresses.push_back(address);
      communicator.reset();
      auto joined = (*listener)->Join(epoch, rank, addresses, absl::Now() + absl::Seconds(60));
      status = joined.status();
      if (joined.ok()) communicator = *std::move(joined);
    } else if (verb == "calls") {
      RandomCalls calls;
      words >> calls.num_calls >> calls.max_bytes;
      status = MakeRandomCalls(calls, communicator.get());
    } else if (verb == "gather") {
      std::vector<std::byte> in(kLarge), out(kLarge * communicator->world_size());
      while (status.ok()) status = communicator->AllGather(in, absl::MakeSpan(out));
    }
    std::cout << Text(status) << std::endl;
  }
  return 0;
}

// A rank in a process of its own.
class RankProcess {
 public:
  explicit RankProcess(absl::Duration call_timeout) {
    int in[2], out[2];
    LATENTD_CHECK(pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, in[0], 0);
    posix_spawn_file_actions_adddup2(&actions, out[1], 1);
    std::string timeout = absl::StrCat(absl::ToInt64Milliseconds(call_timeout));
    std::string flag = "--rank";
    std::string program = "/proc/self/exe";
    char* arguments[] = {program.data(), flag.data(), timeout.data(), nullptr};
    LATENTD_CHECK(posix_spawn(&pid_, program.c_str(), &actions, nullptr, arguments, environ) == 0);
    posix_spawn_file_actions_destroy(&actions);
    close(in[0]);
    close(out[1]);
    in_ = in[1];
    out_ = out[0];
    address_ = Answer();
  }
  ~RankProcess() {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
    close(in_);
    close(out_);
  }

  const std::string& address() const { return address_; }
  void Signal(int signal) const { kill(pid_, signal); }

  void Tell(const std::string& line) {
    const std::string whole = line + "\n";
    EXPECT_EQ(write(in_, whole.data(), whole.size()), whole.size());
  }

  // The next line that it prints; empty when none comes in 60 s.
  std::string Answer() {
    std::string line;
    const absl::Time end = absl::Now() + absl::Seconds(60);
    while (absl::Now() < end) {
      pollfd fd{.fd = out_, .events = POLLIN, .revents = 0};
      if (poll(&fd, 1, 100) <= 0) continue;
      char c;
      if (read(out_, &c, 1) != 1) break;
      if (c == '\n') return line;
      line += c;
    }
    return "";
  }

 private:
  pid_t pid_ = 0;
  int in_ = -1, out_ = -1;
  std::string address_;
};

class TcpFaultsTest : public ::testing::Test {
 protected:
  void Start(int world_size, absl::Duration call_timeout) {
    call_timeout_ = call_timeout;
    for (int rank = 0; rank < world_size; ++rank) StartAgain(rank);
  }

  void StartAgain(size_t rank) {
    ranks_.resize(std::max(ranks_.size(), rank + 1));
    ranks_[rank] = std::make_unique<RankProcess>(call_timeout_);
  }

  void TellJoin(int rank, int64_t epoch) {
    ranks_[rank]->Tell(absl::StrCat("join ", epoch, " ", rank, " ",
                                    absl::StrJoin(ranks_, " ", [](std::string* out, auto& rank) {
                                      absl::StrAppend(out, rank->address());
                                    })));
  }

  void ExpectJoined(int64_t epoch) {
    for (size_t rank = 0; rank < ranks_.size(); ++rank) TellJoin(static_cast<int>(rank), epoch);
    for (auto& rank : ranks_) EXPECT_EQ(rank->Answer(), "OK");
  }

  void TellAll(const std::string& line) {
    for (auto& rank : ranks_) rank->Tell(line);
  }

  void ExpectCallsWork() {
    TellAll("calls 30 5000");
    for (auto& rank : ranks_) EXPECT_EQ(rank->Answer(), "OK");
  }

  absl::Duration call_timeout_;
  std::vector<std::unique_ptr<RankProcess>> ranks_;
};

constexpr char kForever[] = "calls 1000000000 3000";
constexpr char kForeverLarge[] = "gather";

TEST_F(TcpFaultsTest, AKilledRankIsNamedAtOnceAndItsSuccessorTaken) {
  Start(4, absl::Seconds(60));
  for (int epoch = 1; epoch <= 3; ++epoch) {
    ExpectJoined(epoch);
    TellAll(epoch == 2 ? kForeverLarge : kForever);
    absl::SleepFor(absl::Milliseconds(30));
    const int killed = epoch;
    ranks_[killed]->Signal(SIGKILL);
    const absl::Time start = absl::Now();
    std::string all;
    for (int rank = 0; rank < 4; ++rank) {
      if (rank == killed) continue;
      const std::string answer = ranks_[rank]->Answer();
      EXPECT_THAT(answer, StartsWith("UNAVAILABLE"));
      absl::StrAppend(&all, answer, "\n");
    }
    EXPECT_LT(absl::Now() - start, absl::Seconds(10));
    EXPECT_THAT(all, HasSubstr(absl::StrCat("rank ", killed, " is gone")));
    StartAgain(killed);
  }
  ExpectJoined(4);
  ExpectCallsWork();
}

TEST_F(TcpFaultsTest, AStoppedRankIsNamedWhenTheTimeoutOfACallIsOver) {
  Start(3, absl::Seconds(2));
  for (const char* calls : {kForever, kForeverLarge}) {
    ExpectJoined(calls == kForever ? 1 : 2);
    TellAll(calls);
    absl::SleepFor(absl::Milliseconds(30));
    ranks_[1]->Signal(SIGSTOP);
    std::string all;
    for (const int rank : {0, 2}) {
      const std::string answer = ranks_[rank]->Answer();
      EXPECT_THAT(answer, StartsWith("DEADLINE_EXCEEDED"));
      absl::StrAppend(&all, answer, "\n");
    }
    EXPECT_THAT(all, ContainsRegex("for ranks? [^:]*1[^:]*: not there within 2s"));
    // It goes on, hears that the group is over, and may join the next one.
    ranks_[1]->Signal(SIGCONT);
    EXPECT_THAT(ranks_[1]->Answer(), HasSubstr("not there within 2s"));
  }
  ExpectJoined(3);
  ExpectCallsWork();
}

TEST_F(TcpFaultsTest, ARankKilledWhileTheGroupFormsIsNamedAtOnce) {
  Start(3, absl::Seconds(60));
  TellJoin(0, 1);
  TellJoin(1, 1);
  absl::SleepFor(absl::Milliseconds(200));  // these two are connected then
  ranks_[1]->Signal(SIGKILL);
  EXPECT_EQ(ranks_[0]->Answer(),
            "UNAVAILABLE Join #1 for rank 2: rank 1 is gone: it closed the connection");
  StartAgain(1);
  ExpectJoined(2);
  ExpectCallsWork();
}

// Of this thread's network alone.
bool SetLoopback(bool up) {
  const Socket socket(::socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  ifreq request = {};
  std::strcpy(request.ifr_name, "lo");
  if (ioctl(socket.fd(), SIOCGIFFLAGS, &request) != 0) return false;
  request.ifr_flags =
      static_cast<short>(up ? request.ifr_flags | IFF_UP : request.ifr_flags & ~IFF_UP);
  return ioctl(socket.fd(), SIOCSIFFLAGS, &request) == 0;
}

TEST_F(TcpFaultsTest, ACutNetworkIsADeadlineAndHealedGoodForTheNextGroup) {
  bool may = true;
  std::thread in_a_network_of_its_own([&] {
    may = unshare(CLONE_NEWNET) == 0 && SetLoopback(true);
    if (!may) return;
    Start(3, absl::Seconds(2));
    ExpectJoined(1);
    TellAll(kForever);
    absl::SleepFor(absl::Milliseconds(30));
    EXPECT_TRUE(SetLoopback(false));
    for (auto& rank : ranks_) {
      const std::string answer = rank->Answer();
      EXPECT_THAT(answer, StartsWith("DEADLINE_EXCEEDED"));
      EXPECT_THAT(answer, ContainsRegex("for ranks? [^:]*: not there within 2s"));
    }
    EXPECT_TRUE(SetLoopback(true));
    ExpectJoined(2);
    ExpectCallsWork();
    if (std::getenv("LATENTD_TEST_LONG") != nullptr) {  // cut while idle: the probes notice
      EXPECT_TRUE(SetLoopback(false));
      absl::SleepFor(absl::Seconds(90));
      EXPECT_TRUE(SetLoopback(true));
      TellAll("calls 2 100");
      for (auto& rank : ranks_)
        EXPECT_THAT(rank->Answer(), HasSubstr("is gone: Connection timed out"));
    }
    ranks_.clear();  // they die with the thread that has started them
  });
  in_a_network_of_its_own.join();
  if (!may) GTEST_SKIP() << "a network of its own needs CAP_SYS_ADMIN";
}

// Half an hour with LATENTD_TEST_LONG=1.
TEST_F(TcpFaultsTest, ABurstAfterIdleTimeWorks) {
  Start(3, absl::Seconds(10));
  ExpectJoined(1);
  ExpectCallsWork();
  absl::SleepFor(std::getenv("LATENTD_TEST_LONG") != nullptr ? absl::Minutes(31)
                                                             : absl::Seconds(1));
  ExpectCallsWork();
}

TEST_F(TcpFaultsTest, ARankThatDiedInIdleTimeIsNamedByTheNextCall) {
  Start(3, absl::Seconds(60));
  ExpectJoined(1);
  ranks_[2]->Signal(SIGKILL);
  absl::SleepFor(absl::Milliseconds(100));
  for (const int rank : {0, 1}) ranks_[rank]->Tell("calls 2 100");
  for (const int rank : {0, 1}) {
    EXPECT_THAT(ranks_[rank]->Answer(), HasSubstr("rank 2 is gone"));
  }
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  if (argc == 3 && std::string(argv[1]) == "--rank") {
    return latentd::RunRank(absl::Milliseconds(std::atoi(argv[2])));
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
