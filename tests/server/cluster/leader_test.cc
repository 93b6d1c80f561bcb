// What ranks and agents may say to a leader, and what it makes of it: the protocol of rank.proto.

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "latentd/v1/rank.grpc.pb.h"
#include "server/cluster/cluster_leader.h"
#include "server/cluster/remote_engine.h"
#include "tests/server/cluster/random_plan.h"
#include "tests/server/cluster/test_cluster.h"

namespace latentd {
namespace {

using ::testing::HasSubstr;

// A peer that says what a test wants.
template <typename Out, typename In>
class Peer {
 public:
  using Stream = grpc::ClientReaderWriter<Out, In>;

  explicit Peer(int port)
      : stub_(v1::RankService::NewStub(grpc::CreateChannel(absl::StrCat("127.0.0.1:", port),
                                                           grpc::InsecureChannelCredentials()))) {
    if constexpr (std::is_same_v<Out, v1::RankMessage>) {
      stream_ = stub_->Join(&context_);
    } else {
      stream_ = stub_->Attach(&context_);
    }
  }
  ~Peer() {
    context_.TryCancel();
    In message;
    while (stream_->Read(&message)) continue;
    if (!finished_) stream_->Finish();
  }

  void Send(const Out& message) { stream_->Write(message); }
  // The next message that is not a welcome; none when the stream ends.
  In Read() {
    In message;
    if (!stream_->Read(&message)) message.Clear();
    return message;
  }
  grpc::Status End() {
    In message;
    while (stream_->Read(&message)) continue;
    finished_ = true;
    return stream_->Finish();
  }

 private:
  std::unique_ptr<v1::RankService::Stub> stub_;
  grpc::ClientContext context_;
  std::unique_ptr<Stream> stream_;
  bool finished_ = false;
};
using RankPeer = Peer<v1::RankMessage, v1::LeaderMessage>;
using NodePeer = Peer<v1::NodeMessage, v1::NodeCommand>;

v1::RankMessage JoinMessage(int32_t rank, int32_t pid = 1) {
  v1::RankMessage message;
  v1::RankJoin& join = *message.mutable_join();
  join.set_version("1");
  join.set_rank(rank);
  join.set_pid(pid);
  join.set_config_hash("c");
  join.set_checkpoint_hash("w");
  return message;
}

v1::RankMessage ReadyMessage() {
  v1::RankMessage message;
  v1::EngineLimits& limits = *message.mutable_ready()->mutable_limits();
  limits.set_num_blocks(10);
  limits.set_max_step_tokens(100);
  limits.set_max_sequences(4);
  limits.set_max_model_len(100);
  limits.set_vocab_size(50);
  message.mutable_ready()->set_address(":7");
  return message;
}

v1::RankMessage FormedMessage(int64_t epoch) {
  v1::RankMessage message;
  message.mutable_formed()->set_epoch(epoch);
  return message;
}

v1::NodeMessage AttachMessage(int32_t node) {
  v1::NodeMessage message;
  message.mutable_attach()->set_version("1");
  message.mutable_attach()->set_node(node);
  message.mutable_attach()->set_config_hash("c");
  return message;
}

// Counts what it is told to kill.
class Killer final : public NodeControl {
 public:
  void KillRank(int32_t, int32_t pid, const std::string&) override { pid_ = pid; }
  int32_t pid() const { return pid_; }

 private:
  std::atomic<int32_t> pid_{0};
};

class LeaderTest : public ::testing::Test {
 protected:
  void Start(ClusterOptions options) {
    auto leader = ClusterLeader::Start(options);
    ASSERT_TRUE(leader.ok()) << leader.status();
    leader_ = *std::move(leader);
    leader_->SetLocalNode(&killer_);
  }
  void TearDown() override { leader_->SetLocalNode(nullptr); }

  // A refusal names what it is refused for.
  void ExpectRefused(const v1::RankMessage& message, grpc::StatusCode code,
                     const std::string& text) {
    RankPeer rank(leader_->port());
    rank.Send(message);
    const grpc::Status status = rank.End();
    EXPECT_EQ(status.error_code(), code) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(text));
  }
  // A rank that is in the group.
  std::unique_ptr<RankPeer> Formed(int32_t pid) {
    auto rank = std::make_unique<RankPeer>(leader_->port());
    rank->Send(JoinMessage(0, pid));
    EXPECT_TRUE(rank->Read().has_welcome());
    rank->Send(ReadyMessage());
    const v1::LeaderMessage form = rank->Read();
    EXPECT_TRUE(form.has_form());
    rank->Send(FormedMessage(form.form().epoch()));
    AwaitEpoch(form.form().epoch());
    return rank;
  }
  void AwaitEpoch(int64_t epoch) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (leader_->formed_epoch() != epoch && absl::Now() < deadline) {
      absl::SleepFor(absl::Milliseconds(1));
    }
    EXPECT_EQ(leader_->formed_epoch(), epoch);
  }
  int64_t lost(LossReason reason) const {
    return leader_->stats().ranks_lost[static_cast<size_t>(reason)];
  }
  void AwaitLost(LossReason reason, int64_t count) {
    const absl::Time deadline = absl::Now() + absl::Seconds(30);
    while (lost(reason) < count && absl::Now() < deadline) absl::SleepFor(absl::Milliseconds(1));
    EXPECT_EQ(lost(reason), count);
  }

  Killer killer_;
  std::unique_ptr<ClusterLeader> leader_;
};

TEST_F(LeaderTest, RefusesWhoIsNotOfItsKind) {
  Start(TestOptions(2));
  v1::RankMessage other = JoinMessage(0);
  other.mutable_join()->set_version("2");
  ExpectRefused(other, grpc::StatusCode::FAILED_PRECONDITION,
                "version is '2'; the leader's is '1'");
  other = JoinMessage(0);
  other.mutable_join()->set_config_hash("d");
  ExpectRefused(other, grpc::StatusCode::FAILED_PRECONDITION,
                "configuration is 'd'; the leader's is 'c'");
  other = JoinMessage(0);
  other.mutable_join()->set_checkpoint_hash("");
  ExpectRefused(other, grpc::StatusCode::FAILED_PRECONDITION,
                "checkpoint is ''; the leader's is 'w'");
  ExpectRefused(JoinMessage(2), grpc::StatusCode::INVALID_ARGUMENT, "rank is 2; world_size is 2");
  ExpectRefused(JoinMessage(-1), grpc::StatusCode::INVALID_ARGUMENT, "rank is -1");
  other = JoinMessage(0);
  other.mutable_join()->set_node(1);
  ExpectRefused(other, grpc::StatusCode::INVALID_ARGUMENT, "node is 1; num_nodes is 1");
  ExpectRefused(ReadyMessage(), grpc::StatusCode::INVALID_ARGUMENT, "first message");
}

TEST_F(LeaderTest, RefusesARankThatIsThere) {
  Start(TestOptions(2));
  auto rank = std::make_unique<RankPeer>(leader_->port());
  rank->Send(JoinMessage(1, 77));
  const v1::LeaderMessage welcome = rank->Read();
  EXPECT_EQ(welcome.welcome().world_size(), 2);
  EXPECT_EQ(welcome.welcome().num_blocks(), 0);
  EXPECT_GT(welcome.welcome().heartbeat_interval_ms(), 0);
  ExpectRefused(JoinMessage(1, 78), grpc::StatusCode::ALREADY_EXISTS, "pid 77");
  rank.reset();
  AwaitLost(LossReason::kExited, 1);
  RankPeer next(leader_->port());
  next.Send(JoinMessage(1, 78));
  EXPECT_TRUE(next.Read().has_welcome());
}

TEST_F(LeaderTest, FormsWithAddressesAndTheIdOfRank0) {
  Start(TestOptions(2));
  RankPeer first(leader_->port()), second(leader_->port());
  first.Send(JoinMessage(0));
  second.Send(JoinMessage(1));
  v1::RankMessage ready = ReadyMessage();
  ready.mutable_ready()->set_nccl_unique_id("unique");
  first.Send(ready);
  ready = ReadyMessage();
  ready.mutable_ready()->set_address("other.host:8");
  ready.mutable_ready()->mutable_limits()->set_num_blocks(9);
  second.Send(ready);
  EXPECT_TRUE(first.Read().has_welcome());
  const v1::Form form = first.Read().form();
  EXPECT_EQ(form.epoch(), 1);
  EXPECT_EQ(form.world_size(), 2);
  ASSERT_EQ(form.addresses_size(), 2);
  EXPECT_EQ(form.addresses(0), "127.0.0.1:7");  // an empty host is the peer's own
  EXPECT_EQ(form.addresses(1), "other.host:8");
  EXPECT_EQ(form.nccl_unique_id(), "unique");
  EXPECT_GT(form.timeout_ms(), 0);
  first.Send(FormedMessage(1));
  second.Send(FormedMessage(1));
  AwaitEpoch(1);
  EXPECT_EQ(leader_->info().num_blocks, 9);  // of the rank that has least
  EXPECT_EQ(leader_->info().num_dp_ranks, 2);
}

TEST_F(LeaderTest, AnotherProcessOfARankIsToldHowManyBlocksAndMayNotHaveLess) {
  Start(TestOptions(1));
  Formed(1).reset();
  AwaitLost(LossReason::kExited, 1);
  {
    RankPeer small(leader_->port());
    small.Send(JoinMessage(0, 2));
    EXPECT_EQ(small.Read().welcome().num_blocks(), 10);
    v1::RankMessage ready = ReadyMessage();
    ready.mutable_ready()->mutable_limits()->set_num_blocks(9);
    small.Send(ready);
    AwaitLost(LossReason::kUnfit, 1);
    EXPECT_EQ(killer_.pid(), 2);
  }
  const auto next = Formed(3);
  EXPECT_EQ(leader_->info().num_blocks, 10);
}

TEST_F(LeaderTest, WhoIsSilentIsKilled) {
  ClusterOptions options = TestOptions(1);
  options.heartbeat_timeout = absl::Milliseconds(300);
  Start(options);
  const auto stopped = Formed(55);
  AwaitLost(LossReason::kSilent, 1);
  EXPECT_EQ(killer_.pid(), 55);
  EXPECT_EQ(leader_->formed_epoch(), 0);
}

TEST_F(LeaderTest, AHeartbeatIsASignOfLife) {
  ClusterOptions options = TestOptions(1);
  options.heartbeat_timeout = absl::Milliseconds(1500);
  Start(options);
  const auto rank = Formed(55);
  v1::RankMessage heartbeat;
  heartbeat.mutable_heartbeat()->set_step(1);
  for (int i = 0; i < 20; ++i) {
    rank->Send(heartbeat);
    absl::SleepFor(absl::Milliseconds(100));
  }
  EXPECT_EQ(lost(LossReason::kSilent), 0);
}

TEST_F(LeaderTest, WhatCannotBeIsGarbage) {
  Start(TestOptions(1));
  int64_t count = 0;
  v1::RankMessage second_ready = ReadyMessage();
  v1::RankMessage empty;
  v1::RankMessage second_join = JoinMessage(0);
  v1::RankMessage no_step;
  no_step.mutable_step_done()->set_step(3);
  for (v1::RankMessage message : {second_ready, empty, second_join, no_step}) {
    const auto rank = Formed(static_cast<int32_t>(100 + count));
    if (message.has_step_done()) message.mutable_step_done()->set_epoch(leader_->formed_epoch());
    rank->Send(message);
    AwaitLost(LossReason::kGarbage, ++count);
    EXPECT_EQ(killer_.pid(), 99 + count);
  }
}

TEST_F(LeaderTest, AStepThatIsAnsweredWithBytesThatAreNoneIsAborted) {
  Start(TestOptions(1));
  const auto rank = Formed(5);
  RemoteEngine engine(leader_.get());
  std::thread liar([&] {
    const v1::LeaderMessage message = rank->Read();
    StepPlan plan;
    EXPECT_TRUE(DecodePlan(message.step().plan(), &plan).ok());
    EXPECT_EQ(plan.step, 4);
    EXPECT_EQ(plan.shape.num_tokens, 1);
    v1::RankMessage done;
    done.mutable_step_done()->set_epoch(message.step().epoch());
    done.mutable_step_done()->set_step(4);
    done.mutable_step_done()->set_result("garbage");
    rank->Send(done);
  });
  StepPlan plan;
  plan.step = 4;
  plan.sequences = {{.id = 1, .num_tokens = 1, .num_blocks = 1, .sample = true}};
  plan.tokens = {3};
  plan.blocks = {0};
  const absl::StatusOr<StepResult> result = engine.Execute(plan);
  liar.join();
  EXPECT_EQ(result.status().code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(result.status().message()), HasSubstr("the result has 7 bytes"));
  EXPECT_FALSE(engine.ready());
  EXPECT_EQ(engine.Execute(plan).status().code(), absl::StatusCode::kCancelled);  // not begun
}

TEST_F(LeaderTest, ARankThatCannotLoadFailsTheLoading) {
  Start(TestOptions(2));
  RankPeer rank(leader_->port());
  rank.Send(JoinMessage(1));
  v1::RankMessage failed;
  failed.mutable_failed()->mutable_status()->set_code(
      static_cast<int32_t>(absl::StatusCode::kResourceExhausted));
  failed.mutable_failed()->mutable_status()->set_message("weights need 9 GB");
  rank.Send(failed);
  const absl::StatusOr<bool> formed = leader_->AwaitGroup(absl::Seconds(30));
  EXPECT_EQ(formed.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(formed.status().message()), HasSubstr("rank 1: weights need 9 GB"));
}

TEST_F(LeaderTest, ARankThatNeverComesSoFarFailsTheLoading) {
  Start(TestOptions(1));
  for (int32_t pid = 1; pid < 5; ++pid) leader_->OnRankExited(0, pid, "exit code 2");
  EXPECT_TRUE(leader_->AwaitGroup(absl::Milliseconds(1)).ok());
  leader_->OnRankExited(0, 5, "exit code 2");
  const absl::StatusOr<bool> formed = leader_->AwaitGroup(absl::Seconds(30));
  EXPECT_EQ(formed.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(formed.status().message()), HasSubstr("lost 5 times"));
}

TEST_F(LeaderTest, AnExitOfTheProcessBeforeIsNotThatOfThisOne) {
  Start(TestOptions(1));
  const auto rank = Formed(8);
  leader_->OnRankExited(0, 7, "signal 9 (Killed)");
  EXPECT_EQ(leader_->formed_epoch(), 1);
  leader_->OnRankExited(0, 8, "signal 9 (Killed)");
  EXPECT_EQ(leader_->formed_epoch(), 0);
  EXPECT_EQ(lost(LossReason::kExited), 1);
}

TEST_F(LeaderTest, AnAgentIsToldItsRanksAndWhomToKill) {
  ClusterOptions options = TestOptions(4);
  options.num_nodes = 2;
  options.heartbeat_timeout = absl::Seconds(1);
  Start(options);
  NodePeer node(leader_->port());
  node.Send(AttachMessage(1));
  const v1::NodeCommand start = node.Read();
  ASSERT_EQ(start.start_ranks().ranks_size(), 2);
  EXPECT_EQ(start.start_ranks().ranks(0), 2);
  EXPECT_EQ(start.start_ranks().ranks(1), 3);
  {
    NodePeer other(leader_->port());
    other.Send(AttachMessage(1));
    EXPECT_EQ(other.End().error_code(), grpc::StatusCode::ALREADY_EXISTS);
    NodePeer local(leader_->port());
    local.Send(AttachMessage(0));
    EXPECT_EQ(local.End().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    NodePeer wrong(leader_->port());
    v1::NodeMessage attach = AttachMessage(1);
    attach.mutable_attach()->set_config_hash("d");
    wrong.Send(attach);
    EXPECT_EQ(wrong.End().error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  }
  RankPeer rank(leader_->port());
  v1::RankMessage join = JoinMessage(3, 333);
  join.mutable_join()->set_node(1);
  rank.Send(join);
  EXPECT_TRUE(rank.Read().has_welcome());
  v1::RankMessage none;
  rank.Send(none);
  AwaitLost(LossReason::kGarbage, 1);
  const v1::NodeCommand kill = node.Read();
  EXPECT_EQ(kill.kill_rank().rank(), 3);
  EXPECT_EQ(kill.kill_rank().pid(), 333);
  EXPECT_EQ(killer_.pid(), 0);
}

TEST_F(LeaderTest, PeersAreToldThatItEnds) {
  ClusterOptions options = TestOptions(2);
  options.num_nodes = 2;
  Start(options);
  NodePeer node(leader_->port());
  node.Send(AttachMessage(1));
  EXPECT_TRUE(node.Read().has_start_ranks());
  RankPeer rank(leader_->port());
  rank.Send(JoinMessage(0));
  EXPECT_TRUE(rank.Read().has_welcome());
  leader_->Shutdown();
  EXPECT_TRUE(node.Read().has_shutdown());
  EXPECT_TRUE(rank.Read().has_shutdown());
}

TEST(StepMessageTest, IsWhatProtobufWouldSend) {
  std::mt19937_64 random(5);
  for (const int64_t epoch : {int64_t{1}, int64_t{300}, int64_t{1} << 40}) {
    const StepPlan plan = RandomPlan(&random);
    grpc::ByteBuffer bytes = EncodeStepMessage(epoch, plan);
    v1::LeaderMessage message;
    ASSERT_TRUE(grpc::SerializationTraits<v1::LeaderMessage>::Deserialize(&bytes, &message).ok());
    EXPECT_EQ(message.step().epoch(), epoch);
    EXPECT_EQ(message.step().plan(), Encoded(plan));
  }
}

TEST(PeerHostTest, WithoutPortAndKind) {
  EXPECT_EQ(PeerHost("ipv4:10.0.0.1:4567"), "10.0.0.1");
  EXPECT_EQ(PeerHost("ipv6:%5B::1%5D:4567"), "[::1]");
  EXPECT_EQ(PeerHost("ipv6:[fe80::1%25eth0]:4567"), "[fe80::1%eth0]");
  EXPECT_EQ(PeerHost("unix:/tmp/socket"), "");
}

}  // namespace
}  // namespace latentd
