#include "server/cluster/cluster_leader.h"

#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/log.h"

namespace latentd {
namespace {

constexpr absl::Duration kShutdownGrace = absl::Seconds(1);

template <typename Message>
bool Parse(grpc::ByteBuffer* bytes, Message* message) {
  return grpc::SerializationTraits<Message>::Deserialize(bytes, message).ok();
}

}  // namespace

// The streams of ranks. Its own members are the server thread's.
class ClusterLeader::Ranks final : public PeerStream::Handler {
 public:
  explicit Ranks(ClusterLeader* leader) : leader_(leader) {}

  void OnMessage(const std::shared_ptr<PeerStream>& stream, grpc::ByteBuffer* bytes) override {
    const bool parsed = Parse(bytes, &message_);
    const absl::Time now = absl::Now();
    absl::MutexLock lock(&leader_->mutex_);
    RankGroup& group = *leader_->group_;
    const auto known = rank_of_.find(stream.get());
    if (known == rank_of_.end()) {
      if (!parsed || !message_.has_join()) {
        stream->Finish(absl::InvalidArgumentError("the first message of a rank is join"));
        return;
      }
      if (const absl::Status status = group.Join(message_.join(), stream, now); !status.ok()) {
        stream->Finish(status);
        return;
      }
      rank_of_[stream.get()] = message_.join().rank();
    } else if (group.Holds(known->second, stream.get())) {
      if (parsed) {
        group.OnMessage(known->second, message_, now);
      } else {
        group.OnGarbage(known->second, "a message that cannot be parsed", now);
      }
    }
    leader_->Publish();
  }

  void OnEnd(const std::shared_ptr<PeerStream>& stream) override {
    const auto known = rank_of_.find(stream.get());
    if (known == rank_of_.end()) return;
    absl::MutexLock lock(&leader_->mutex_);
    if (leader_->group_->Holds(known->second, stream.get())) {
      leader_->group_->OnGone(known->second, "its stream ended", absl::Now());
    }
    rank_of_.erase(known);
    leader_->Publish();
  }

 private:
  ClusterLeader* const leader_;
  std::map<const PeerStream*, int32_t> rank_of_;  // streams that joined
  v1::RankMessage message_;                       // the latest; its memory is used again
};

// The streams of nodes' agents, and through them the agents' NodeControl.
class ClusterLeader::Nodes final : public PeerStream::Handler {
 public:
  explicit Nodes(ClusterLeader* leader) : leader_(leader) {}

  void OnMessage(const std::shared_ptr<PeerStream>& stream, grpc::ByteBuffer* bytes) override {
    v1::NodeMessage message;
    const bool parsed = Parse(bytes, &message);
    absl::MutexLock lock(&leader_->mutex_);
    const auto known = node_of_.find(stream.get());
    if (known == node_of_.end()) {
      const absl::Status status =
          parsed && message.has_attach()
              ? Attach(message.attach(), stream)
              : absl::InvalidArgumentError("the first message of an agent is attach");
      if (!status.ok()) {
        LogEvent(spdlog::level::warn, "node refused", {{"why", std::string(status.message())}});
        stream->Finish(status);
      }
      return;
    }
    Agent& agent = agents_[known->second];
    agent.last_heard = absl::Now();
    if (parsed && message.has_rank_exited()) {
      const v1::RankExited& exited = message.rank_exited();
      leader_->group_->OnProcessExited(exited.rank(), exited.pid(), exited.how(), absl::Now());
      leader_->Publish();
    }
  }

  void OnEnd(const std::shared_ptr<PeerStream>& stream) override {
    absl::MutexLock lock(&leader_->mutex_);
    const auto known = node_of_.find(stream.get());
    if (known == node_of_.end()) return;
    LogEvent(spdlog::level::warn, "node lost",
             {{"node", known->second}, {"host", agents_[known->second].host}});
    agents_.erase(known->second);
    node_of_.erase(known);
  }

  void Tick(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(leader_->mutex_) {
    for (auto& [node, agent] : agents_) {
      if (now - agent.last_heard > leader_->options_.heartbeat_timeout) agent.stream->Cancel();
    }
  }

  // Its agent is told; without one the rank stays as it is until the node has one again, which
  // starts all of its ranks anew.
  void KillRank(int32_t node, int32_t rank, int32_t pid, const std::string& why)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(leader_->mutex_) {
    const auto found = agents_.find(node);
    if (found == agents_.end()) return;
    v1::NodeCommand command;
    v1::KillRank& kill = *command.mutable_kill_rank();
    kill.set_rank(rank);
    kill.set_pid(pid);
    kill.set_why(why);
    found->second.stream->Send(command);
  }

  void Shutdown() ABSL_EXCLUSIVE_LOCKS_REQUIRED(leader_->mutex_) {
    v1::NodeCommand command;
    command.mutable_shutdown();
    for (auto& [node, agent] : agents_) {
      agent.stream->Send(command);
      agent.stream->Finish(absl::OkStatus());
    }
  }

 private:
  struct Agent {
    std::shared_ptr<PeerStream> stream;
    std::string host;
    absl::Time last_heard;
  };

  absl::Status Attach(const v1::NodeAttach& attach, const std::shared_ptr<PeerStream>& stream)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(leader_->mutex_) {
    const ClusterOptions& options = leader_->options_;
    if (attach.version() != options.version) {
      return absl::FailedPreconditionError(absl::StrCat("the node's version is '", attach.version(),
                                                        "'; the leader's is '", options.version,
                                                        "'"));
    }
    if (attach.config_hash() != options.config_hash) {
      return absl::FailedPreconditionError(
          absl::StrCat("the node's configuration is '", attach.config_hash(),
                       "'; the leader's is '", options.config_hash, "'"));
    }
    if (attach.node() < 1 || attach.node() >= options.num_nodes) {
      return absl::InvalidArgumentError(
          absl::StrCat("node is ", attach.node(),
                       "; it must be at least 1 and less than num_nodes, ", options.num_nodes));
    }
    if (agents_.contains(attach.node())) {
      return absl::AlreadyExistsError(absl::StrCat("node ", attach.node(), " is there already, on ",
                                                   agents_[attach.node()].host));
    }
    agents_[attach.node()] = {.stream = stream, .host = attach.host(), .last_heard = absl::Now()};
    node_of_[stream.get()] = attach.node();
    LogEvent(spdlog::level::info, "node attached",
             {{"node", attach.node()}, {"host", attach.host()}, {"pid", attach.pid()}});
    v1::NodeCommand command;
    command.mutable_start_ranks();
    const int32_t ranks_per_node = options.world_size / options.num_nodes;
    for (int32_t i = 0; i < ranks_per_node; ++i) {
      command.mutable_start_ranks()->add_ranks(attach.node() * ranks_per_node + i);
    }
    stream->Send(command);
    return absl::OkStatus();
  }

  ClusterLeader* const leader_;
  std::map<const PeerStream*, int32_t> node_of_ ABSL_GUARDED_BY(leader_->mutex_);
  std::map<int32_t, Agent> agents_ ABSL_GUARDED_BY(leader_->mutex_);  // by node
};

ClusterLeader::ClusterLeader(const ClusterOptions& options)
    : options_(options),
      group_(std::make_unique<RankGroup>(
          options,
          [this](const ClusterStats::Rank& where, int32_t rank, int32_t pid, const std::string& why)
              ABSL_NO_THREAD_SAFETY_ANALYSIS { KillRank(where.node, rank, pid, why); })),
      ranks_(std::make_unique<Ranks>(this)),
      nodes_(std::make_unique<Nodes>(this)) {}

absl::StatusOr<std::unique_ptr<ClusterLeader>> ClusterLeader::Start(const ClusterOptions& options) {
  auto leader = std::unique_ptr<ClusterLeader>(new ClusterLeader(options));
  ASSIGN_OR_RETURN(leader->server_,
                   PeerServer::Start({.listen = options.listen,
                                      .ranks = leader->ranks_.get(),
                                      .nodes = leader->nodes_.get(),
                                      .on_tick = [self = leader.get()] { self->OnTick(); }}));
  LogEvent(spdlog::level::info, "listening for ranks",
           {{"cluster_listen", options.listen},
            {"port", leader->port()},
            {"world_size", options.world_size}});
  return leader;
}

ClusterLeader::~ClusterLeader() {
  if (server_ == nullptr) return;
  Shutdown();
  server_->Stop(kShutdownGrace);
}

void ClusterLeader::Shutdown() {
  absl::MutexLock lock(&mutex_);
  group_->Shutdown();
  nodes_->Shutdown();
  Publish();
}

void ClusterLeader::SetLocalNode(NodeControl* node) {
  absl::MutexLock lock(&mutex_);
  local_node_ = node;
}

void ClusterLeader::KillRank(int32_t node, int32_t rank, int32_t pid, const std::string& why) {
  if (node != 0) return nodes_->KillRank(node, rank, pid, why);
  if (local_node_ != nullptr) local_node_->KillRank(rank, pid, why);
}

void ClusterLeader::OnRankExited(int32_t rank, int32_t pid, const std::string& how) {
  absl::MutexLock lock(&mutex_);
  group_->OnProcessExited(rank, pid, how, absl::Now());
  Publish();
}

void ClusterLeader::OnTick() {
  const absl::Time now = absl::Now();
  absl::MutexLock lock(&mutex_);
  group_->Tick(now);
  nodes_->Tick(now);
  Publish();
}

void ClusterLeader::Publish() {
  const int64_t epoch = group_->formed_epoch();
  if (epoch != formed_epoch_) {
    formed_epoch_ = epoch;
    changed_.SignalAll();
  } else if (group_->step_done() || !group_->load_status().ok()) {
    changed_.SignalAll();
  }
}

absl::StatusOr<bool> ClusterLeader::AwaitGroup(absl::Duration timeout) {
  const absl::Time deadline = absl::Now() + timeout;
  absl::MutexLock lock(&mutex_);
  while (true) {
    RETURN_IF_ERROR(group_->load_status());
    if (group_->formed_epoch() != 0) return true;
    if (changed_.WaitWithDeadline(&mutex_, deadline)) return group_->formed_epoch() != 0;
  }
}

EngineInfo ClusterLeader::info() const {
  absl::MutexLock lock(&mutex_);
  LATENTD_CHECK(group_->info().has_value());
  return *group_->info();
}

GroupProgress ClusterLeader::progress() const {
  absl::MutexLock lock(&mutex_);
  return group_->progress();
}

ClusterStats ClusterLeader::stats() const {
  absl::MutexLock lock(&mutex_);
  return group_->stats();
}

absl::Status ClusterLeader::RunStep(int64_t epoch, int64_t step,
                                    std::vector<grpc::ByteBuffer> messages,
                                    std::vector<StepResult>* results) {
  std::vector<std::shared_ptr<PeerStream>> streams;
  {
    absl::MutexLock lock(&mutex_);
    if (!group_->BeginStep(epoch, step, results, &streams)) {
      return absl::AbortedError("there is no group of the ranks now");
    }
  }
  const absl::Time deadline = absl::Now() + options_.step_deadline;
  server_->Post([streams = std::move(streams), messages = std::move(messages)] {
    for (size_t rank = 0; rank < streams.size(); ++rank) streams[rank]->Send(messages[rank]);
  });
  absl::MutexLock lock(&mutex_);
  while (!group_->step_done()) {
    if (changed_.WaitWithDeadline(&mutex_, deadline)) {
      group_->OnStepDeadline(absl::Now());
      Publish();
    }
  }
  return group_->EndStep();
}

void ClusterLeader::RefuseResult(int32_t rank, const std::string& what) {
  absl::MutexLock lock(&mutex_);
  group_->OnGarbage(rank, what, absl::Now());
  Publish();
}

}  // namespace latentd
