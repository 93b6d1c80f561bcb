#include "server/cluster/node_agent.h"

#include <algorithm>
#include <thread>
#include <utility>

#include "absl/time/clock.h"
#include "server/cluster/leader_channel.h"
#include "server/log.h"
#include "server/status.h"

namespace latentd {
namespace {

constexpr absl::Duration kSayInterval = absl::Minutes(1);

// That no other try will end otherwise.
bool IsFinal(const absl::Status& status) {
  return absl::IsFailedPrecondition(status) || absl::IsInvalidArgument(status);
}

}  // namespace

NodeAgent::NodeAgent(NodeAgentOptions options)
    : options_(std::move(options)),
      supervisor_({.command = options_.command,
                   .on_exit = [this](int32_t rank, int32_t pid, const std::string& how) {
                     OnExit(rank, pid, how);
                   }}) {}

NodeAgent::~NodeAgent() { supervisor_.Stop(absl::ZeroDuration()); }

absl::Status NodeAgent::Run() {
  absl::Duration wait = options_.shortest_wait;
  absl::Time next_said = absl::InfinitePast();
  while (true) {
    // A new channel for each try: an old one waits up to two minutes between looking up a name that
    // there was not.
    const auto stub = v1::RankService::NewStub(
        DialLeader(options_.leader, options_.keepalive_time, options_.keepalive_timeout));
    bool heard = false;
    const absl::Status status = Attach(stub.get(), &heard);
    supervisor_.Stop(options_.grace);
    if (IsFinal(status)) return status;
    {
      absl::MutexLock lock(&mutex_);
      if (stopped_) return absl::OkStatus();
    }
    const std::string why = status.ok() ? "it ended" : std::string(status.message());
    if (heard) {
      wait = options_.shortest_wait;
      LogEvent(spdlog::level::warn,
               "the leader is gone; its ranks have ended, the next one is awaited",
               {{"leader", options_.leader}, {"why", why}});
    } else if (absl::Now() >= next_said) {  // not with every try
      LogEvent(spdlog::level::warn, "no leader yet; it is tried again and again",
               {{"leader", options_.leader}, {"why", why}});
      next_said = absl::Now() + kSayInterval;
    }
    if (!Sleep(wait)) return absl::OkStatus();
    wait = std::min(2 * wait, options_.longest_wait);
  }
}

void NodeAgent::Stop() {
  absl::MutexLock lock(&mutex_);
  stopped_ = true;
  if (context_ != nullptr) context_->TryCancel();
  changed_.SignalAll();
}

bool NodeAgent::Sleep(absl::Duration time) {
  const absl::Time deadline = absl::Now() + time;
  absl::MutexLock lock(&mutex_);
  while (!stopped_ && !changed_.WaitWithDeadline(&mutex_, deadline)) {
  }
  return !stopped_;
}

absl::Status NodeAgent::Attach(v1::RankService::Stub* stub, bool* heard) {
  grpc::ClientContext context;
  {
    absl::MutexLock lock(&mutex_);
    if (stopped_) return absl::CancelledError("the agent ends");
    context_ = &context;
    exits_.clear();  // of the leader before
  }
  const std::unique_ptr<Stream> stream = stub->Attach(&context);
  v1::NodeMessage attach;
  *attach.mutable_attach() = options_.attach;
  bool ended = false;  // guarded by mutex_
  std::thread reports;
  if (stream->Write(attach)) {
    reports = std::thread([this, &stream, &ended] { Report(stream.get(), &ended); });
    v1::NodeCommand command;
    while (stream->Read(&command)) {
      if (!*heard) LogEvent(spdlog::level::info, "attached", {{"leader", options_.leader}});
      *heard = true;
      Obey(command);
    }
  }
  {
    absl::MutexLock lock(&mutex_);
    ended = true;
    changed_.SignalAll();
  }
  if (reports.joinable()) reports.join();
  const absl::Status status = FromGrpcStatus(stream->Finish());
  absl::MutexLock lock(&mutex_);
  context_ = nullptr;
  return status;
}

void NodeAgent::Obey(const v1::NodeCommand& command) {
  switch (command.message_case()) {
    case v1::NodeCommand::kStartRanks: {
      std::vector<int32_t> ranks;
      for (const int32_t rank : command.start_ranks().ranks()) {
        if (rank >= options_.first_rank && rank - options_.first_rank < options_.num_ranks) {
          ranks.push_back(rank);
        } else {
          LogEvent(spdlog::level::err, "told to start a rank of another node", {{"rank", rank}});
        }
      }
      supervisor_.Start(ranks);
      return;
    }
    case v1::NodeCommand::kKillRank:
      supervisor_.KillRank(command.kill_rank().rank(), command.kill_rank().pid(),
                           command.kill_rank().why());
      return;
    case v1::NodeCommand::kShutdown:
      supervisor_.Stop(options_.grace);
      return;
    case v1::NodeCommand::MESSAGE_NOT_SET:
      return;
  }
}

void NodeAgent::Report(Stream* stream, const bool* ended) {
  absl::Time next_heartbeat = absl::Now() + options_.heartbeat_interval;
  while (true) {
    std::vector<v1::RankExited> exits;
    {
      absl::MutexLock lock(&mutex_);
      while (!*ended && exits_.empty() && !changed_.WaitWithDeadline(&mutex_, next_heartbeat)) {
      }
      if (*ended) return;
      exits.swap(exits_);
    }
    for (v1::RankExited& exited : exits) {
      v1::NodeMessage message;
      message.mutable_rank_exited()->Swap(&exited);
      if (!stream->Write(message)) return;
    }
    if (absl::Now() < next_heartbeat) continue;
    v1::NodeMessage message;
    message.mutable_heartbeat();
    if (!stream->Write(message)) return;
    next_heartbeat = absl::Now() + options_.heartbeat_interval;
  }
}

void NodeAgent::OnExit(int32_t rank, int32_t pid, const std::string& how) {
  absl::MutexLock lock(&mutex_);
  v1::RankExited& exited = exits_.emplace_back();
  exited.set_rank(rank);
  exited.set_pid(pid);
  exited.set_how(how);
  changed_.SignalAll();
}

}  // namespace latentd
