#ifndef LATENTD_ENGINE_COMM_TCP_LISTENER_H_
#define LATENTD_ENGINE_COMM_TCP_LISTENER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/comm/communicator.h"
#include "engine/comm/socket.h"

namespace latentd {

class TcpCommunicator;

// Where the peers of a rank that is a process find it. It listens once and joins one group after
// another; between two, peers that are early wait in the kernel's queue.
//
// Peers are told apart from strangers by what they say first, not by a secret: the port is for a
// network that is trusted.
class TcpListener {
 public:
  struct Options {
    std::string listen = "127.0.0.1:0";  // host:port; port 0 is a free one
    // The host of address(); empty: that of `listen`, or none where that is all interfaces.
    std::string advertised_host = "";
    absl::Duration call_timeout = absl::Minutes(1);  // of each call of a communicator
  };
  static absl::StatusOr<std::unique_ptr<TcpListener>> Listen(const Options& options);

  // "host:port" for the peers; ":port" when only they know how this host is called.
  const std::string& address() const { return address_; }

  // Joins the group of `epoch` as `rank` of addresses.size() ranks and returns when all others have
  // too, with the communicator of this rank. Ranks that give another epoch or other addresses are
  // waited for: they may be late. A communicator of before should be destroyed first. One thread at
  // a time.
  //
  // Errors name the ranks that are missing: DEADLINE_EXCEEDED, UNAVAILABLE after an Abort() here or
  // on a peer and when a peer is gone, INTERNAL when something else answers at a peer's address.
  absl::StatusOr<std::unique_ptr<Communicator>> Join(int64_t epoch, int rank,
                                                     std::vector<std::string> addresses,
                                                     absl::Time deadline);

  // Ends the Join() of `epoch`, under way or about to begin, here and on the peers, with
  // UNAVAILABLE and the message of `why`. Any thread.
  void Abort(int64_t epoch, const absl::Status& why);

  // "Join #7 for ranks 2, 3"; empty without one. Any thread.
  std::string waiting_in() const;

 private:
  TcpListener(Socket socket, std::string address, absl::Duration call_timeout);

  const Socket socket_;
  const std::string address_;
  const absl::Duration call_timeout_;

  mutable absl::Mutex mutex_;
  TcpCommunicator* joining_ ABSL_GUARDED_BY(mutex_) = nullptr;  // Join()'s, while it is under way
  int64_t joining_epoch_ ABSL_GUARDED_BY(mutex_) = 0;
  // An Abort() whose Join() has not ended yet. Epochs may come again with another leader.
  std::optional<int64_t> aborted_epoch_ ABSL_GUARDED_BY(mutex_);
  absl::Status abort_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_TCP_LISTENER_H_
