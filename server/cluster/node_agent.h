#ifndef LATENTD_SERVER_CLUSTER_NODE_AGENT_H_
#define LATENTD_SERVER_CLUSTER_NODE_AGENT_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"
#include "latentd/v1/rank.grpc.pb.h"
#include "server/cluster/process_supervisor.h"

namespace latentd {

struct NodeAgentOptions {
  std::string leader;  // host:port
  v1::NodeAttach attach;
  // The ranks that it may be told to start: those of its node.
  int32_t first_rank = 0;
  int32_t num_ranks = 0;
  // How one is started.
  std::function<ProcessCommand(int32_t rank)> command;

  absl::Duration heartbeat_interval = absl::Seconds(1);
  absl::Duration keepalive_time = absl::Seconds(3);  // a leader that does not answer is gone
  absl::Duration keepalive_timeout = absl::Seconds(3);
  // Between two tries to find a leader, doubled from the one to the other.
  absl::Duration shortest_wait = absl::Milliseconds(100);
  absl::Duration longest_wait = absl::Seconds(3);
  absl::Duration grace = absl::Seconds(5);  // for ranks to exit, before they are killed
};

// What `latentd node` is: keeps the ranks of one node running for a leader on another one.
//
// It attaches to the leader, which says which ranks to start and to kill, and tells it which have
// exited. When the leader ends or is gone its ranks are ended too, and the agent waits for the next
// leader, for ever.
class NodeAgent {
 public:
  explicit NodeAgent(NodeAgentOptions options);
  ~NodeAgent();

  // Until Stop(): OK, and no rank is left. Or until a leader does not take this node, and never
  // will: FAILED_PRECONDITION (another version or configuration) or INVALID_ARGUMENT (not one of
  // its nodes), in the leader's words. To be called once.
  absl::Status Run() ABSL_LOCKS_EXCLUDED(mutex_);

  // Ends Run(). Any thread.
  void Stop() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  using Stream = grpc::ClientReaderWriter<v1::NodeMessage, v1::NodeCommand>;

  // One leader, from attaching to its end: how the stream ended. `heard`: it sent something.
  absl::Status Attach(v1::RankService::Stub* stub, bool* heard) ABSL_LOCKS_EXCLUDED(mutex_);
  void Obey(const v1::NodeCommand& command);
  // Sends exits and heartbeats until the stream is broken or at its end.
  void Report(Stream* stream, const bool* ended) ABSL_LOCKS_EXCLUDED(mutex_);
  void OnExit(int32_t rank, int32_t pid, const std::string& how) ABSL_LOCKS_EXCLUDED(mutex_);
  // False when Stop() was called meanwhile.
  bool Sleep(absl::Duration time) ABSL_LOCKS_EXCLUDED(mutex_);

  const NodeAgentOptions options_;
  absl::Mutex mutex_;
  absl::CondVar changed_;
  bool stopped_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::ClientContext* context_ ABSL_GUARDED_BY(mutex_) = nullptr;  // of the stream there is
  std::vector<v1::RankExited> exits_ ABSL_GUARDED_BY(mutex_);       // to be told
  ProcessSupervisor supervisor_;  // last: its thread calls OnExit()
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_NODE_AGENT_H_
