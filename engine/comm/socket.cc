#include "engine/comm/socket.h"

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kBacklog = 1024;  // peers that come before this rank joins wait here

absl::Status Error(absl::string_view what) {
  return absl::UnavailableError(absl::StrCat(what, ": ", ErrorText(errno)));
}

void SetOption(const Socket& socket, int level, int option, int value) {
  setsockopt(socket.fd(), level, option, &value, sizeof(value));
}

}  // namespace

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<HostPort> ParseHostPort(absl::string_view text) {
  const auto bad = [&] {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is no host:port (an IPv6 address stands in brackets)"));
  };
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return bad();
  absl::string_view host = text.substr(0, colon);
  const absl::string_view port = text.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  } else if (host.find_first_of("[]:") != absl::string_view::npos) {
    return bad();
  }
  int number = 0;
  if (!absl::SimpleAtoi(port, &number) || number < 0 || number > 65535) return bad();
  return HostPort{.host = std::string(host), .port = absl::StrCat(number)};
}

std::string HostPortText(const HostPort& address) {
  const bool brackets = address.host.find(':') != std::string::npos;
  return absl::StrCat(brackets ? "[" : "", address.host, brackets ? "]" : "", ":", address.port);
}

std::string SocketAddressText(const SocketAddress& address) {
  char host[NI_MAXHOST], port[NI_MAXSERV];
  if (getnameinfo(address.get(), address.length, host, sizeof(host), port, sizeof(port),
                  NI_NUMERICHOST | NI_NUMERICSERV) != 0) {
    return "an unknown address";
  }
  return HostPortText({.host = host, .port = port});
}

absl::StatusOr<std::vector<SocketAddress>> Resolve(const HostPort& address, bool numeric) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_NUMERICSERV | (numeric ? AI_NUMERICHOST : 0);
  addrinfo* list = nullptr;
  const int error = getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &list);
  if (error != 0) {
    return absl::UnavailableError(absl::StrCat(
        HostPortText(address), ": ", error == EAI_SYSTEM ? ErrorText(errno) : gai_strerror(error)));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(list, freeaddrinfo);
  std::vector<SocketAddress> found;
  for (const addrinfo* info = list; info != nullptr; info = info->ai_next) {
    SocketAddress& next = found.emplace_back();
    std::memcpy(&next.storage, info->ai_addr, info->ai_addrlen);
    next.length = info->ai_addrlen;
  }
  return found;
}

absl::StatusOr<Socket> ListenOn(const SocketAddress& address) {
  Socket socket(::socket(address.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.is_open()) return Error("socket");
  SetOption(socket, SOL_SOCKET, SO_REUSEADDR, 1);
  if (bind(socket.fd(), address.get(), address.length) != 0 || listen(socket.fd(), kBacklog) != 0) {
    return Error(SocketAddressText(address));
  }
  return socket;
}

absl::StatusOr<SocketAddress> LocalAddress(const Socket& socket) {
  SocketAddress address;
  address.length = sizeof(address.storage);
  if (getsockname(socket.fd(), reinterpret_cast<sockaddr*>(&address.storage), &address.length) !=
      0) {
    return Error("getsockname");
  }
  return address;
}

absl::StatusOr<Socket> BeginConnect(const SocketAddress& to) {
  Socket socket(::socket(to.storage.ss_family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0));
  if (!socket.is_open()) return Error("socket");
  if (connect(socket.fd(), to.get(), to.length) != 0 && errno != EINPROGRESS) {
    return Error(SocketAddressText(to));
  }
  return socket;
}

absl::Status ConnectError(const Socket& socket) {
  int error = 0;
  socklen_t length = sizeof(error);
  if (getsockopt(socket.fd(), SOL_SOCKET, SO_ERROR, &error, &length) != 0) error = errno;
  if (error != 0) return absl::UnavailableError(ErrorText(error));
  // A port from which connections are made may be the one that is dialled: with nobody listening
  // there, the kernel connects the socket to itself.
  SocketAddress peer;
  peer.length = sizeof(peer.storage);
  if (getpeername(socket.fd(), reinterpret_cast<sockaddr*>(&peer.storage), &peer.length) != 0) {
    return Error("getpeername");
  }
  ASSIGN_OR_RETURN(const SocketAddress local, LocalAddress(socket));
  if (SocketAddressText(local) == SocketAddressText(peer)) {
    return absl::UnavailableError(ErrorText(ECONNREFUSED));
  }
  return absl::OkStatus();
}

void TuneConnection(const Socket& socket, absl::Duration stall) {
  SetOption(socket, IPPROTO_TCP, TCP_NODELAY, 1);
  SetOption(socket, SOL_SOCKET, SO_KEEPALIVE, 1);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPIDLE, kKeepaliveSeconds);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPINTVL, 5);
  SetOption(socket, IPPROTO_TCP, TCP_KEEPCNT, 4);
  // It counts time with a full buffer at the peer too, which is no error before `stall`. It is also
  // how long the probes may stay without answer.
  constexpr absl::Duration kLeast = absl::Seconds(2 * kKeepaliveSeconds);
  const absl::Duration limit = std::clamp(stall, kLeast, absl::Hours(24));
  SetOption(socket, IPPROTO_TCP, TCP_USER_TIMEOUT,
            static_cast<int>(absl::ToInt64Milliseconds(limit)));
}

std::string ErrorText(int error_number) { return std::generic_category().message(error_number); }

SteadyTime After(absl::Duration duration) {
  constexpr absl::Duration kYear = absl::Hours(24 * 365);
  return std::chrono::steady_clock::now() +
         absl::ToChronoNanoseconds(std::clamp(duration, absl::ZeroDuration(), kYear));
}

int PollTimeout(SteadyTime until) {
  const auto left =
      std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
  return static_cast<int>(std::clamp<int64_t>(left.count(), 0, 1 << 30));
}

}  // namespace latentd
