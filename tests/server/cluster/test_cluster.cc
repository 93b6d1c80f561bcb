#include "tests/server/cluster/test_cluster.h"

#include <unistd.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"

namespace latentd {

TestRanks::TestRanks(const Options& options, FakeFabric* fabric, int port)
    : options_(options), fabric_(fabric), port_(port), ranks_(fabric->world_size()) {}

TestRanks::~TestRanks() {
  stopping_ = true;
  for (int32_t rank = 0; rank < fabric_->world_size(); ++rank) Kill(rank);
  for (Rank& rank : ranks_) {
    if (rank.thread.joinable()) rank.thread.join();
  }
}

void TestRanks::Start(OnRankExit on_exit) {
  for (int32_t rank = 0; rank < fabric_->world_size(); ++rank) {
    ranks_[rank].thread = std::thread([this, rank, on_exit] { Run(rank, on_exit); });
  }
}

void TestRanks::Run(int32_t rank, const OnRankExit& on_exit) {
  while (!stopping_) {
    auto killed = std::make_shared<std::atomic<bool>>(false);
    const auto loader = [this, rank, killed](int32_t num_blocks, LoadListener* listener)
        -> absl::StatusOr<std::unique_ptr<GroupMember>> {
      listener->OnProgress(100, 100);
      FakeMember::Options member = {.engine = options_.engine,
                                    .rank = rank,
                                    .fabric = fabric_,
                                    .die = [this, rank] { Kill(rank); },
                                    .killed = killed.get(),
                                    .step_time = options_.step_time};
      member.engine.info.num_dp_ranks = fabric_->world_size();
      if (num_blocks > 0) member.engine.info.num_blocks = num_blocks;
      return std::make_unique<FakeMember>(std::move(member));
    };
    auto session = std::make_shared<RankSession>(
        RankSessionOptions{.leader = absl::StrCat("127.0.0.1:", port_),
                           .rank = rank,
                           .version = options_.version,
                           .config_hash = options_.config_hash,
                           .checkpoint_hash = options_.checkpoint_hash},
        loader);
    {
      absl::MutexLock lock(&mutex_);
      if (stopping_) return;
      ranks_[rank].session = session;
      ranks_[rank].killed = killed;
    }
    const absl::Status status = session->Run();
    {
      absl::MutexLock lock(&mutex_);
      ranks_[rank].session.reset();
      ranks_[rank].last_exit = status;
    }
    on_exit(rank, getpid(), std::string(status.message()));
    if (!options_.restart || status.ok()) return;
    absl::SleepFor(absl::Milliseconds(10));
  }
}

void TestRanks::Kill(int32_t rank) {
  std::shared_ptr<RankSession> session;
  {
    absl::MutexLock lock(&mutex_);
    if (ranks_[rank].killed != nullptr) *ranks_[rank].killed = true;
    session = ranks_[rank].session;
  }
  if (session != nullptr) session->Stop();
}

void TestRanks::KillRank(int32_t rank, int32_t, const std::string&) {
  ++num_kills_;
  Kill(rank);
}

absl::Status TestRanks::last_exit(int32_t rank) const {
  absl::MutexLock lock(&mutex_);
  return ranks_[rank].last_exit;
}

ClusterOptions TestOptions(int32_t world_size) {
  return {.world_size = world_size,
          .version = "1",
          .config_hash = "c",
          .checkpoint_hash = "w",
          .heartbeat_timeout = absl::Seconds(30),
          .min_backoff = absl::Milliseconds(5),
          .max_backoff = absl::Milliseconds(40)};
}

TestCluster::TestCluster(int32_t world_size, ClusterOptions leader_options,
                         TestRanks::Options rank_options)
    : fabric(world_size) {
  if (leader_options.version.empty()) leader_options = TestOptions(world_size);
  auto started = ClusterLeader::Start(leader_options);
  LATENTD_CHECK(started.ok());
  leader = *std::move(started);
  ranks = std::make_unique<TestRanks>(rank_options, &fabric, leader->port());
  leader->SetLocalNode(ranks.get());
  ranks->Start([this](int32_t rank, int32_t pid, const std::string& how) {
    leader->OnRankExited(rank, pid, how);
  });
}

TestCluster::~TestCluster() {
  leader->SetLocalNode(nullptr);
  ranks.reset();
}

void TestCluster::AwaitEpoch(int64_t epoch) const {
  const absl::Time deadline = absl::Now() + absl::Seconds(60);
  while (leader->formed_epoch() < epoch) {
    LATENTD_CHECK(absl::Now() < deadline);
    absl::SleepFor(absl::Milliseconds(1));
  }
}

}  // namespace latentd
