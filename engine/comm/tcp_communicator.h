#ifndef LATENTD_ENGINE_COMM_TCP_COMMUNICATOR_H_
#define LATENTD_ENGINE_COMM_TCP_COMMUNICATOR_H_

#include <poll.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "engine/comm/call.h"
#include "engine/comm/communicator.h"
#include "engine/comm/socket.h"
#include "engine/comm/tcp_forming.h"
#include "engine/comm/tcp_wire.h"

namespace latentd {

// A group whose ranks are processes, each connected with each other one (tcp_listener.h makes
// them).
//
// The calling thread does all sending and receiving within its calls; there is no other thread.
// Each call sends each peer one message and receives one from each, all of them at the same time,
// so ranks that all send more than the kernel buffers do not wait for each other. What is received
// goes straight into the caller's memory: a peer can make nothing be allocated.
//
// What ends the group for one rank is told to the others at once, with the reason.
class TcpCommunicator : public Communicator {
 public:
  // A call ends with DEADLINE_EXCEEDED when it has not ended within `call_timeout`.
  static absl::StatusOr<std::unique_ptr<TcpCommunicator>> Create(int rank, int world_size,
                                                                 absl::Duration call_timeout);

  // Must come first, once. Returns when every rank of the group is connected with every other.
  absl::Status Connect(const MeshSpec& spec, const Socket& listener, SteadyTime deadline);

  int rank() const override { return rank_; }
  int world_size() const override { return world_size_; }
  absl::Status AllGather(absl::Span<const std::byte> in, absl::Span<std::byte> out) override;
  absl::Status AllToAll(absl::Span<const absl::Span<const std::byte>> to,
                        absl::Span<const absl::Span<std::byte>> from) override;
  absl::Status ReduceScatter(absl::Span<const float> in, absl::Span<float> out) override;
  absl::Status Barrier() override;
  void Abort(const absl::Status& why) override;
  std::string waiting_in() const override;

 private:
  // One message to a peer and one from it.
  struct Transfer {
    MessageHeader sent_header, received_header;
    absl::Span<const std::byte> to;
    absl::Span<std::byte> from;
    size_t sent = 0, received = 0;  // bytes, of header and data

    bool sending() const { return sent < sizeof(MessageHeader) + to.size(); }
    bool receiving() const { return received < sizeof(MessageHeader) + from.size(); }
  };

  // The end of the group that a peer tells.
  struct IncomingNote {
    Note note;
    char text[Note::kMaxLength];
    size_t received = 0;
    bool closed = false;  // nothing more will come
  };

  TcpCommunicator(int rank, int world_size, absl::Duration call_timeout, Socket interrupt);

  Call Next(CallKind kind) { return {.kind = kind, .number = ++num_calls_}; }
  absl::Status Run(const Call& call, bool fits, SteadyTime deadline);
  absl::Status Exchange(const Call& call, SteadyTime deadline);
  absl::Status Progress(const Call& call, int timeout);
  absl::Status Send(int peer);
  absl::Status Receive(const Call& call, int peer);
  absl::Status CheckHeader(const Call& call, int peer) const;
  absl::Status ReadNote(int peer);
  absl::Status PeerGone(int peer, const std::string& how);
  static absl::Status Gone(int peer, const std::string& how);
  // The error of a call; ends the group.
  absl::Status Fail(const Call& call, const absl::Status& error);

  // The first error counts; true when this is it. Tells the peers.
  bool End(const absl::Status& error, int origin);
  void TellPeers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  absl::Status EndError() const;
  bool ended() const;
  void SetWaiting(const Call& call, std::vector<int> ranks);
  std::vector<int> WaitingFor() const;

  const int rank_;
  const int world_size_;
  const absl::Duration call_timeout_;
  const Socket interrupt_;  // an eventfd, readable once the group has ended

  // The calling thread's.
  uint64_t num_calls_ = 0;
  absl::Status error_;               // of the call that failed
  std::vector<Transfer> transfers_;  // [world_size]; `to` and `from` are a call's arguments
  std::vector<IncomingNote> notes_;  // [world_size]
  std::vector<float> parts_;         // ReduceScatter: what the peers sent
  std::vector<pollfd> fds_;

  mutable absl::Mutex mutex_;
  // [world_size]. The data sockets are the calling thread's; anyone may send on the control
  // sockets. Set once, before the first call.
  std::vector<PeerSockets> peers_;
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
  int end_origin_ ABSL_GUARDED_BY(mutex_) = 0;  // the rank that ended the group
  Call waiting_call_ ABSL_GUARDED_BY(mutex_);
  std::vector<int> waiting_for_ ABSL_GUARDED_BY(mutex_);  // ranks
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_TCP_COMMUNICATOR_H_
