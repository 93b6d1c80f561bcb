#ifndef LATENTD_ENGINE_COMM_SOCKET_H_
#define LATENTD_ENGINE_COMM_SOCKET_H_

#include <sys/socket.h>

#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace latentd {

// A file descriptor that closes itself.
class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Socket& operator=(Socket&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Socket();

  int fd() const { return fd_; }
  bool is_open() const { return fd_ >= 0; }
  void Close() { *this = Socket(); }

 private:
  int fd_ = -1;
};

// "host:port"; an IPv6 address stands in brackets: "[::1]:7001".
struct HostPort {
  std::string host;  // without brackets
  std::string port;  // a number
};
absl::StatusOr<HostPort> ParseHostPort(absl::string_view text);
std::string HostPortText(const HostPort& address);

struct SocketAddress {
  sockaddr_storage storage = {};
  socklen_t length = 0;

  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};
std::string SocketAddressText(const SocketAddress& address);  // "10.0.0.1:7001"

// What the name service says, which may take as long as it likes unless `numeric`: then only
// addresses are accepted.
absl::StatusOr<std::vector<SocketAddress>> Resolve(const HostPort& address, bool numeric);

// All sockets here are non-blocking and close on exec.
absl::StatusOr<Socket> ListenOn(const SocketAddress& address);
absl::StatusOr<SocketAddress> LocalAddress(const Socket& socket);
// Begins to connect; the socket is writable once that has ended, ConnectError() says how.
absl::StatusOr<Socket> BeginConnect(const SocketAddress& to);
absl::Status ConnectError(const Socket& socket);

// For a connection of two ranks: small messages leave at once; a host that is gone is noticed, and
// what is between keeps an idle connection, by probes every `kKeepaliveSeconds`. Sent bytes that
// nobody takes for `stall` are an error.
inline constexpr int kKeepaliveSeconds = 20;
void TuneConnection(const Socket& socket, absl::Duration stall);

std::string ErrorText(int error_number);  // "Connection refused"

using SteadyTime = std::chrono::steady_clock::time_point;

SteadyTime After(absl::Duration duration);  // from now on; at most a year
int PollTimeout(SteadyTime until);          // milliseconds, rounded up; 0: it is past

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_SOCKET_H_
