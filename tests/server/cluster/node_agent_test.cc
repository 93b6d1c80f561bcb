#include "server/cluster/node_agent.h"

#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "tests/server/cluster/within.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;
using ::testing::AnyOf;
using ::testing::HasSubstr;

// A leader that does as the test says: real gRPC, one agent.
class FakeLeader final : public v1::RankService::Service {
 public:
  // On `port`, or any (0).
  explicit FakeLeader(int port = 0, grpc::Status refusal = grpc::Status::OK)
      : refusal_(std::move(refusal)) {
    grpc::ServerBuilder builder;
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 100);
    builder.AddListeningPort("127.0.0.1:" + std::to_string(port), grpc::InsecureServerCredentials(),
                             &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  // Cuts what is open, as the end of a process does.
  ~FakeLeader() override {
    if (server_ != nullptr) server_->Shutdown(absl::ToChronoTime(absl::Now()));
  }

  grpc::Status Attach(grpc::ServerContext*,
                      grpc::ServerReaderWriter<v1::NodeCommand, v1::NodeMessage>* stream) override {
    v1::NodeMessage message;
    if (!stream->Read(&message)) return grpc::Status::OK;
    {
      absl::MutexLock lock(&mutex_);
      messages_.push_back(message);
      if (!refusal_.ok()) return refusal_;
      stream_ = stream;
    }
    while (stream->Read(&message)) {
      absl::MutexLock lock(&mutex_);
      messages_.push_back(message);
      if (finish_) break;  // at the next heartbeat
    }
    absl::MutexLock lock(&mutex_);
    stream_ = nullptr;
    return grpc::Status::OK;
  }

  bool running() const { return server_ != nullptr; }
  int port() const { return port_; }
  bool attached() {
    absl::MutexLock lock(&mutex_);
    return stream_ != nullptr;
  }
  std::vector<v1::NodeMessage> messages() {
    absl::MutexLock lock(&mutex_);
    return messages_;
  }
  std::vector<v1::RankExited> exits() {
    std::vector<v1::RankExited> exits;
    for (const v1::NodeMessage& message : messages()) {
      if (message.has_rank_exited()) exits.push_back(message.rank_exited());
    }
    return exits;
  }
  void Send(const v1::NodeCommand& command) {
    absl::MutexLock lock(&mutex_);
    ASSERT_NE(stream_, nullptr);
    ASSERT_TRUE(stream_->Write(command));
  }
  void StartRanks(std::vector<int32_t> ranks) {
    v1::NodeCommand command;
    for (int32_t rank : ranks) command.mutable_start_ranks()->add_ranks(rank);
    Send(command);
  }
  void Kill(int32_t rank, int32_t pid) {
    v1::NodeCommand command;
    command.mutable_kill_rank()->set_rank(rank);
    command.mutable_kill_rank()->set_pid(pid);
    command.mutable_kill_rank()->set_why("test");
    Send(command);
  }
  void Finish() {
    absl::MutexLock lock(&mutex_);
    finish_ = true;
  }

 private:
  absl::Mutex mutex_;
  const grpc::Status refusal_;
  bool finish_ = false;
  grpc::ServerReaderWriter<v1::NodeCommand, v1::NodeMessage>* stream_ = nullptr;
  std::vector<v1::NodeMessage> messages_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// The agent of node 1 of 2, with two ranks a node.
class NodeAgentTest : public ::testing::Test {
 protected:
  void SetUp() override {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  void TearDown() override {
    EndAgent();
    fs::remove_all(dir_);
  }

  std::string File(int32_t rank) const { return (dir_ / std::to_string(rank)).string(); }

  void RunAgent(int port, const std::string& mode = "polite") {
    NodeAgentOptions options;
    options.leader = "127.0.0.1:" + std::to_string(port);
    options.attach.set_version("1.2.3");
    options.attach.set_node(1);
    options.attach.set_host("here");
    options.attach.set_pid(getpid());
    options.attach.set_config_hash("abc");
    options.first_rank = 2;
    options.num_ranks = 2;
    options.command = [this, mode](int32_t rank) {
      return ProcessCommand{SUPERVISED_CHILD, {"child", mode, File(rank)}, {}};
    };
    options.heartbeat_interval = absl::Milliseconds(50);
    options.shortest_wait = absl::Milliseconds(20);
    options.longest_wait = absl::Milliseconds(200);
    options.grace = absl::Milliseconds(500);
    agent_ = std::make_unique<NodeAgent>(std::move(options));
    ended_ = false;
    thread_ = std::thread([this] {
      status_ = agent_->Run();
      ended_ = true;
    });
  }
  void EndAgent() {
    if (agent_ == nullptr) return;
    agent_->Stop();
    thread_.join();
    agent_.reset();
  }

  std::vector<int32_t> Pids(int32_t rank) const {
    std::ifstream stream(File(rank));
    std::vector<int32_t> pids;
    for (std::string line; std::getline(stream, line);) pids.push_back(std::atoi(line.c_str()));
    return pids;
  }
  // The `nth` process (from 1) of a rank, once it runs.
  int32_t AwaitPid(int32_t rank, size_t nth = 1) {
    EXPECT_TRUE(Within(kPatience, [&] { return Pids(rank).size() >= nth; }));
    return Pids(rank).size() >= nth ? Pids(rank)[nth - 1] : 0;
  }
  static bool Exists(int32_t pid) { return kill(pid, 0) == 0; }

  const fs::path dir_ =
      fs::path(::testing::TempDir()) / ("node_agent_test_" + std::to_string(getpid()));
  std::unique_ptr<NodeAgent> agent_;
  std::thread thread_;
  std::atomic<bool> ended_{false};
  absl::Status status_;  // once ended_
};

TEST_F(NodeAgentTest, AttachesSaysWhoItIsAndBeats) {
  FakeLeader leader;
  RunAgent(leader.port());
  ASSERT_TRUE(Within(kPatience, [&] { return leader.messages().size() >= 4; }));
  const auto messages = leader.messages();
  ASSERT_TRUE(messages[0].has_attach());
  EXPECT_EQ(messages[0].attach().version(), "1.2.3");
  EXPECT_EQ(messages[0].attach().node(), 1);
  EXPECT_EQ(messages[0].attach().host(), "here");
  EXPECT_EQ(messages[0].attach().pid(), getpid());
  EXPECT_EQ(messages[0].attach().config_hash(), "abc");
  for (size_t i = 1; i < messages.size(); ++i) EXPECT_TRUE(messages[i].has_heartbeat());
  EXPECT_TRUE(Pids(2).empty());  // it starts nothing that it was not told to
}

TEST_F(NodeAgentTest, StartsRanksAndTellsOfTheirEnd) {
  FakeLeader leader;
  RunAgent(leader.port());
  ASSERT_TRUE(Within(kPatience, [&] { return leader.attached(); }));
  leader.StartRanks({2, 3, 0, 4, -1});  // and some that are not of this node
  const int32_t pid = AwaitPid(2);
  AwaitPid(3);
  EXPECT_FALSE(fs::exists(File(0)));
  EXPECT_FALSE(fs::exists(File(4)));
  ASSERT_EQ(kill(pid, SIGUSR1), 0);
  ASSERT_TRUE(Within(kPatience, [&] { return !leader.exits().empty(); }));
  EXPECT_EQ(leader.exits()[0].rank(), 2);
  EXPECT_EQ(leader.exits()[0].pid(), pid);
  EXPECT_EQ(leader.exits()[0].how(), "signal 10 (User defined signal 1)");
  const int32_t second = AwaitPid(2, 2);
  // The leader wants it gone, though it is stopped.
  ASSERT_EQ(kill(second, SIGSTOP), 0);
  leader.Kill(2, pid);  // too late: that one is gone
  leader.Kill(2, second);
  AwaitPid(2, 3);
  ASSERT_TRUE(Within(kPatience, [&] { return leader.exits().size() >= 2; }));
  EXPECT_EQ(leader.exits()[1].pid(), second);
  EXPECT_EQ(leader.exits()[1].how(), "signal 9 (Killed)");
  EXPECT_EQ(Pids(3).size(), 1u);
}

TEST_F(NodeAgentTest, StopEndsTheRanks) {
  FakeLeader leader;
  RunAgent(leader.port());
  ASSERT_TRUE(Within(kPatience, [&] { return leader.attached(); }));
  leader.StartRanks({2, 3});
  const int32_t pids[] = {AwaitPid(2), AwaitPid(3)};
  agent_->Stop();
  ASSERT_TRUE(Within(kPatience, [&] { return ended_.load(); }));
  EXPECT_TRUE(status_.ok()) << status_;
  for (int32_t pid : pids) EXPECT_FALSE(Exists(pid));
}

TEST_F(NodeAgentTest, StopEndsTheSearchForALeader) {
  RunAgent(1);  // nobody listens there
  absl::SleepFor(absl::Milliseconds(100));
  EXPECT_FALSE(ended_);
  agent_->Stop();
  ASSERT_TRUE(Within(kPatience, [&] { return ended_.load(); }));
  EXPECT_TRUE(status_.ok()) << status_;
}

TEST_F(NodeAgentTest, ALeaderThatDoesNotWantItIsFinal) {
  for (const grpc::StatusCode code :
       {grpc::StatusCode::FAILED_PRECONDITION, grpc::StatusCode::INVALID_ARGUMENT}) {
    FakeLeader leader(0, grpc::Status(code, "the node's version is '1.2.3'; the leader's is '9'"));
    RunAgent(leader.port());
    ASSERT_TRUE(Within(kPatience, [&] { return ended_.load(); }));
    EXPECT_EQ(static_cast<int>(status_.code()), static_cast<int>(code));
    EXPECT_THAT(std::string(status_.message()), HasSubstr("the leader's is '9'"));
    EXPECT_EQ(leader.messages().size(), 1u);
    EndAgent();
  }
}

// As long as the leader has not noticed that the agent before this one is gone.
TEST_F(NodeAgentTest, ANodeThatIsThereAlreadyIsTriedAgain) {
  FakeLeader leader(0, grpc::Status(grpc::StatusCode::ALREADY_EXISTS, "node 1 is there already"));
  RunAgent(leader.port());
  ASSERT_TRUE(Within(kPatience, [&] { return leader.messages().size() >= 3; }));
  EXPECT_FALSE(ended_);
}

// The leader's process ends; another one takes its port.
TEST_F(NodeAgentTest, TheNextLeaderIsFound) {
  auto leader = std::make_unique<FakeLeader>();
  const int port = leader->port();
  RunAgent(port);
  ASSERT_TRUE(Within(kPatience, [&] { return leader->attached(); }));
  leader->StartRanks({2, 3});
  const int32_t first[] = {AwaitPid(2), AwaitPid(3)};
  leader.reset();
  // Its ranks go with it, and stay away until the next one asks for them.
  ASSERT_TRUE(Within(kPatience, [&] { return !Exists(first[0]) && !Exists(first[1]); }));
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_EQ(Pids(2).size(), 1u);
  ASSERT_TRUE(Within(kPatience, [&] {
    leader = std::make_unique<FakeLeader>(port);
    return leader->running();
  }));
  ASSERT_TRUE(Within(kPatience, [&] { return leader->attached(); }));
  EXPECT_EQ(leader->messages()[0].attach().node(), 1);
  leader->StartRanks({2});
  AwaitPid(2, 2);
  EXPECT_EQ(Pids(3).size(), 1u);
  EXPECT_TRUE(leader->exits().empty());  // nothing of the ranks of the leader before
}

TEST_F(NodeAgentTest, ALeaderThatEndsInOrderIsLeftInOrder) {
  FakeLeader leader;
  RunAgent(leader.port());
  ASSERT_TRUE(Within(kPatience, [&] { return leader.attached(); }));
  leader.StartRanks({3});
  const int32_t pid = AwaitPid(3);
  v1::NodeCommand shutdown;
  shutdown.mutable_shutdown();
  leader.Send(shutdown);
  ASSERT_TRUE(Within(kPatience, [&] { return !Exists(pid); }));
  leader.Finish();
  ASSERT_TRUE(Within(kPatience, [&] { return !leader.attached(); }));
  EXPECT_FALSE(ended_);
}

// A rank that does not listen to SIGTERM does not keep the agent from the next leader.
TEST_F(NodeAgentTest, DeafRanksAreKilled) {
  FakeLeader leader;
  RunAgent(leader.port(), "deaf");
  ASSERT_TRUE(Within(kPatience, [&] { return leader.attached(); }));
  leader.StartRanks({2});
  const int32_t pid = AwaitPid(2);
  agent_->Stop();
  ASSERT_TRUE(Within(kPatience, [&] { return ended_.load(); }));
  EXPECT_FALSE(Exists(pid));
}

}  // namespace
}  // namespace latentd
