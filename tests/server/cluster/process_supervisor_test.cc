#include "server/cluster/process_supervisor.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/cluster/within.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

std::vector<std::string> Lines(const fs::path& file) {
  std::ifstream stream(file);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

bool Exists(int32_t pid) { return kill(pid, 0) == 0; }

class ProcessSupervisorTest : public ::testing::Test {
 protected:
  struct Exit {
    int32_t rank = 0, pid = 0;
    std::string how;
    absl::Time at;
  };

  void SetUp() override {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override {
    supervisor_.reset();
    fs::remove_all(dir_);
  }

  std::string File(int32_t rank) const { return (dir_ / std::to_string(rank)).string(); }

  // Every rank runs the test's child with this mode and its own file, or `argument`.
  void Supervise(const std::string& mode, const std::string& argument = "",
                 absl::Duration steady_after = absl::Minutes(1),
                 absl::Duration longest_wait = absl::Milliseconds(160)) {
    supervisor_ = std::make_unique<ProcessSupervisor>(ProcessSupervisor::Options{
        .command =
            [this, mode, argument](int32_t rank) {
              return ProcessCommand{
                  SUPERVISED_CHILD,
                  {"child", mode, argument.empty() ? File(rank) : argument},
                  {"SUPERVISED_GIVEN=" + std::to_string(rank), "SUPERVISED_REPLACED=new"}};
            },
        .on_exit =
            [this](int32_t rank, int32_t pid, const std::string& how) {
              absl::MutexLock lock(&mutex_);
              exits_.push_back({rank, pid, how, absl::Now()});
            },
        .shortest_wait = absl::Milliseconds(20),
        .longest_wait = longest_wait,
        .steady_after = steady_after});
  }

  std::vector<Exit> exits() {
    absl::MutexLock lock(&mutex_);
    return exits_;
  }
  // The pid of a rank that has begun to run as the `nth` one (from 1) of its rank.
  int32_t AwaitPid(int32_t rank, size_t nth = 1) {
    EXPECT_TRUE(Within(kPatience, [&] { return Lines(File(rank)).size() >= nth; }));
    const auto lines = Lines(File(rank));
    return lines.size() >= nth ? std::atoi(lines[nth - 1].c_str()) : 0;
  }

  const fs::path dir_ =
      fs::path(::testing::TempDir()) / ("process_supervisor_test_" + std::to_string(getpid()));
  absl::Mutex mutex_;
  std::vector<Exit> exits_;
  std::unique_ptr<ProcessSupervisor> supervisor_;
};

TEST_F(ProcessSupervisorTest, ARankThatExitsIsReportedAndStartedAgain) {
  Supervise("exit", "7");
  supervisor_->Start({4, 5});
  ASSERT_TRUE(Within(kPatience, [&] { return exits().size() >= 8; }));
  std::map<int32_t, int> count;
  for (const Exit& exit : exits()) {
    EXPECT_EQ(exit.how, "exit code 7");
    EXPECT_GT(exit.pid, 0);
    ++count[exit.rank];
  }
  EXPECT_EQ(count.size(), 2u);
  EXPECT_GE(count[4], 2);
  EXPECT_GE(count[5], 2);
}

TEST_F(ProcessSupervisorTest, AnExitWithSuccessIsAnExitToo) {
  Supervise("exit", "0");
  supervisor_->Start({0});
  ASSERT_TRUE(Within(kPatience, [&] { return exits().size() >= 2; }));
  EXPECT_EQ(exits()[1].how, "exit code 0");
}

// 20, 40, 80, 160, 160 ms: six exits take at least 460 ms, however fast the machine.
TEST_F(ProcessSupervisorTest, TheWaitDoublesUpToItsLongest) {
  Supervise("exit", "1");
  supervisor_->Start({0});
  ASSERT_TRUE(Within(kPatience, [&] { return exits().size() >= 6; }));
  const auto seen = exits();
  EXPECT_GE(seen[5].at - seen[0].at, absl::Milliseconds(460));
  EXPECT_GE(seen[4].at - seen[3].at, absl::Milliseconds(155));
  // It does not grow beyond: ten more would take minutes.
  ASSERT_TRUE(Within(kPatience, [&] { return exits().size() >= 12; }));
}

// Thirteen exits with waits that double would take 82 s.
TEST_F(ProcessSupervisorTest, AProcessThatRanLongIsStartedAgainAtOnce) {
  Supervise("exit", "1", /*steady_after=*/absl::ZeroDuration(), /*longest_wait=*/absl::Hours(1));
  supervisor_->Start({0});
  EXPECT_TRUE(Within(kPatience, [&] { return exits().size() >= 13; }));
}

TEST_F(ProcessSupervisorTest, AKilledRankComesBackAsAnotherProcess) {
  Supervise("polite");
  supervisor_->Start({2});
  const int32_t first = AwaitPid(2);
  EXPECT_EQ(supervisor_->pid(2), first);
  supervisor_->KillRank(2, first, "test");
  const int32_t second = AwaitPid(2, 2);
  EXPECT_NE(second, first);
  ASSERT_EQ(exits().size(), 1u);
  EXPECT_EQ(exits()[0].pid, first);
  EXPECT_EQ(exits()[0].how, "signal 9 (Killed)");
  EXPECT_FALSE(Exists(first));  // reaped
  // A late order for the process that is gone does not hit its successor.
  supervisor_->KillRank(2, first, "test");
  supervisor_->KillRank(3, second, "test");
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(supervisor_->pid(2), second);
}

TEST_F(ProcessSupervisorTest, AStoppedRankCanBeKilled) {
  Supervise("polite");
  supervisor_->Start({0});
  const int32_t pid = AwaitPid(0);
  ASSERT_EQ(kill(pid, SIGSTOP), 0);
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_TRUE(exits().empty());  // stopped is not gone
  supervisor_->KillRank(0, pid, "test");
  EXPECT_NE(AwaitPid(0, 2), pid);
}

TEST_F(ProcessSupervisorTest, StopAsksFirst) {
  Supervise("polite");
  supervisor_->Start({0, 1, 2});
  for (int32_t rank : {0, 1, 2}) AwaitPid(rank);
  const absl::Time begin = absl::Now();
  supervisor_->Stop(absl::Minutes(5));
  EXPECT_LT(absl::Now() - begin, absl::Minutes(4));
  for (int32_t rank : {0, 1, 2}) {
    EXPECT_EQ(supervisor_->pid(rank), 0);
    EXPECT_FALSE(Exists(AwaitPid(rank)));
  }
  EXPECT_TRUE(exits().empty());  // they were asked for
  // And nobody starts them again, unless asked.
  absl::SleepFor(absl::Milliseconds(200));
  EXPECT_EQ(Lines(File(0)).size(), 1u);
  supervisor_->Start({0});
  AwaitPid(0, 2);
}

TEST_F(ProcessSupervisorTest, StopKillsTheDeafAndTheStopped) {
  Supervise("deaf");
  supervisor_->Start({0, 1});
  const int32_t deaf = AwaitPid(0);
  const int32_t stopped = AwaitPid(1);
  ASSERT_EQ(kill(stopped, SIGSTOP), 0);
  const absl::Time begin = absl::Now();
  supervisor_->Stop(absl::Milliseconds(200));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(200));
  EXPECT_FALSE(Exists(deaf));
  EXPECT_FALSE(Exists(stopped));
}

TEST_F(ProcessSupervisorTest, StopDoesNotWaitForTheNextStart) {
  Supervise("exit", "1");
  supervisor_->Start({0, 1, 2, 3});
  ASSERT_TRUE(Within(kPatience, [&] { return exits().size() >= 8; }));
  supervisor_->Stop(absl::Minutes(5));
  const size_t count = exits().size();
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_EQ(exits().size(), count);
}

TEST_F(ProcessSupervisorTest, WhatCannotBeStartedIsReportedAndTriedAgain) {
  supervisor_ = std::make_unique<ProcessSupervisor>(
      ProcessSupervisor::Options{.command =
                                     [](int32_t) {
                                       return ProcessCommand{"/no/such/program", {"child"}, {}};
                                     },
                                 .on_exit =
                                     [this](int32_t rank, int32_t pid, const std::string& how) {
                                       absl::MutexLock lock(&mutex_);
                                       exits_.push_back({rank, pid, how, absl::Now()});
                                     },
                                 .shortest_wait = absl::Milliseconds(5)});
  supervisor_->Start({9});
  ASSERT_TRUE(Within(kPatience, [&] { return exits().size() >= 2; }));
  EXPECT_EQ(exits()[0].pid, 0);
  EXPECT_THAT(exits()[0].how, HasSubstr("/no/such/program cannot be started: No such file"));
}

// A child has nothing of its parent's but standard error: no descriptor, no blocked signal.
TEST_F(ProcessSupervisorTest, NothingLeaksIntoAChild) {
  const int leak = open("/dev/null", O_RDONLY);  // not close-on-exec
  int pipe_fds[2];
  ASSERT_EQ(pipe(pipe_fds), 0);
  setenv("SUPERVISED_REPLACED", "old", 1);
  sigset_t signals, before;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  ASSERT_EQ(pthread_sigmask(SIG_BLOCK, &signals, &before), 0);
  const auto on_pipe = signal(SIGPIPE, SIG_IGN);
  Supervise("inherited");  // its thread blocks the signal, as a daemon's threads do
  supervisor_->Start({6});
  ASSERT_TRUE(Within(kPatience, [&] { return !Lines(File(6)).empty(); }));
  const std::string inherited = Lines(File(6))[0];
  EXPECT_THAT(inherited, HasSubstr("given=6 replaced=new unblocked default own-group"));
  std::string descriptors = inherited.substr(0, inherited.find("given"));
  EXPECT_EQ(descriptors.size(), 6u) << descriptors;  // "0 1 2 " in some order
  for (const char* fd : {"0 ", "1 ", "2 "}) EXPECT_THAT(descriptors, HasSubstr(fd));
  supervisor_.reset();
  signal(SIGPIPE, on_pipe);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  unsetenv("SUPERVISED_REPLACED");
  for (int fd : {leak, pipe_fds[0], pipe_fds[1]}) close(fd);
}

// kill -9 of the parent: its children, which nobody ends, end by themselves.
TEST_F(ProcessSupervisorTest, ChildrenEndWithTheirParent) {
  Supervise("family", dir_.string());
  supervisor_->Start({7});
  for (int32_t child : {0, 1}) {
    ASSERT_TRUE(Within(kPatience,
                       [&] { return Lines(File(child)) == std::vector<std::string>{"locked"}; }));
  }
  const auto held = [&](int32_t child) {
    const int fd = open(File(child).c_str(), O_RDWR | O_CLOEXEC);
    const bool locked = flock(fd, LOCK_EX | LOCK_NB) != 0;
    close(fd);
    return locked;
  };
  EXPECT_TRUE(held(0));
  EXPECT_TRUE(held(1));
  supervisor_->Stop(absl::ZeroDuration());  // SIGKILL: the parent can end nobody
  EXPECT_TRUE(Within(kPatience, [&] { return !held(0) && !held(1); }));
}

TEST(DescribeExitTest, NamesCodesAndSignals) {
  EXPECT_EQ(DescribeExit(W_EXITCODE(0, 0)), "exit code 0");
  EXPECT_EQ(DescribeExit(W_EXITCODE(3, 0)), "exit code 3");
  EXPECT_EQ(DescribeExit(W_EXITCODE(0, SIGKILL)), "signal 9 (Killed)");
  EXPECT_EQ(DescribeExit(W_EXITCODE(0, SIGSEGV) | WCOREFLAG), "signal 11 (Segmentation fault)");
}

TEST(EndWithParentTest, AnotherParentIsTold) {
  EXPECT_FALSE(EndWithParent(1 << 28));
  prctl(PR_SET_PDEATHSIG, 0);  // it was asked for this process
}

}  // namespace
}  // namespace latentd
