#ifndef LATENTD_TESTS_ENGINE_COMM_TCP_HARNESS_H_
#define LATENTD_TESTS_ENGINE_COMM_TCP_HARNESS_H_

#include <sys/socket.h>
#include <sys/time.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/comm/communicator.h"
#include "engine/comm/socket.h"
#include "engine/comm/tcp_listener.h"
#include "engine/status.h"
#include "gtest/gtest.h"
#include "tests/engine/comm/harness.h"

namespace latentd {

using Joined = absl::StatusOr<std::unique_ptr<Communicator>>;

// Ranks on this host that may join one group after another.
class Ranks {
 public:
  explicit Ranks(int world_size, TcpListener::Options options = {}) {
    for (int rank = 0; rank < world_size; ++rank) {
      absl::StatusOr<std::unique_ptr<TcpListener>> listener = TcpListener::Listen(options);
      LATENTD_CHECK(listener.ok());
      listeners.push_back(*std::move(listener));
      addresses.push_back(listeners.back()->address());
    }
  }

  Joined Join(int64_t epoch, int rank, absl::Duration timeout = absl::Seconds(30)) {
    return listeners[rank]->Join(epoch, rank, addresses, absl::Now() + timeout);
  }

  // All ranks join, and make calls.
  void ExpectGroupWorks(int64_t epoch) {
    const int world_size = static_cast<int>(listeners.size());
    Group group(world_size);
    for (const absl::Status& status : OnRanks(world_size, [&](int rank) -> absl::Status {
           ASSIGN_OR_RETURN(group[rank], Join(epoch, rank));
           return MakeRandomCalls({.seed = 3, .num_calls = 10}, group[rank].get());
         })) {
      EXPECT_TRUE(status.ok()) << "epoch " << epoch << ": " << status;
    }
  }

  std::vector<std::unique_ptr<TcpListener>> listeners;
  std::vector<std::string> addresses;
};

// A plain blocking connection to host:port.
inline Socket Dial(const std::string& address) {
  const HostPort host_port = *ParseHostPort(address);
  const SocketAddress to = (*Resolve(host_port, true))[0];
  Socket socket(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  LATENTD_CHECK(connect(socket.fd(), to.get(), to.length) == 0);
  const timeval timeout{.tv_sec = 20, .tv_usec = 0};
  setsockopt(socket.fd(), SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  return socket;
}

template <typename T>
void SendBytes(const Socket& socket, const T& message) {
  EXPECT_EQ(send(socket.fd(), &message, sizeof(message), MSG_NOSIGNAL), sizeof(message));
}

inline void SendText(const Socket& socket, const std::string& text) {
  send(socket.fd(), text.data(), text.size(), MSG_NOSIGNAL);
}

template <typename T>
std::optional<T> ReceiveWhole(const Socket& socket) {
  T message;
  if (recv(socket.fd(), &message, sizeof(message), MSG_WAITALL) != sizeof(message)) return {};
  return message;
}

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_COMM_TCP_HARNESS_H_
