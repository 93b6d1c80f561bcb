#include "server/http.h"

#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <list>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/status.h"
#include "fmt/format.h"

namespace latentd {
namespace {

constexpr size_t kMaxRequestBytes = 8192;
constexpr size_t kMaxConnections = 64;
constexpr absl::Duration kMaxConnectionTime = absl::Seconds(5);

std::string_view ReasonPhrase(int code) {
  switch (code) {
    case 200:
      return "OK";
    case 400:
      return "Bad Request";
    case 404:
      return "Not Found";
    case 405:
      return "Method Not Allowed";
    case 431:
      return "Request Header Fields Too Large";
    case 503:
      return "Service Unavailable";
    default:
      return "Status";
  }
}

// One client: its request is read, answered, and the connection is at its end.
struct Connection {
  explicit Connection(int fd) : fd(fd), deadline(absl::Now() + kMaxConnectionTime) {}
  ~Connection() { close(fd); }
  Connection(const Connection&) = delete;
  Connection& operator=(const Connection&) = delete;

  const int fd;
  const absl::Time deadline;
  std::string in;
  std::string out;  // not empty once the request is answered
  size_t sent = 0;
};

std::string Format(const HttpServer::Response& response, bool with_body) {
  return fmt::format(
      "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n"
      "Connection: close\r\n\r\n{}",
      response.code, ReasonPhrase(response.code), response.content_type, response.body.size(),
      with_body ? std::string_view(response.body) : "");
}

// Answers the request whose head is complete in `request`.
std::string Answer(std::string_view request,
                   const std::map<std::string, HttpServer::Handler>& handlers) {
  const std::string_view line = request.substr(0, request.find("\r\n"));
  const size_t method_end = line.find(' ');
  const size_t target_end = line.rfind(' ');
  if (method_end == std::string_view::npos || target_end == method_end ||
      !line.substr(target_end + 1).starts_with("HTTP/1.") || line[method_end + 1] != '/') {
    return Format({.code = 400, .body = "not an HTTP/1 request\n"}, true);
  }
  const std::string_view method = line.substr(0, method_end);
  if (method != "GET" && method != "HEAD") {
    return Format({.code = 405, .body = "only GET and HEAD\n"}, true);
  }
  std::string_view path = line.substr(method_end + 1, target_end - method_end - 1);
  path = path.substr(0, path.find('?'));
  const auto handler = handlers.find(std::string(path));
  return Format(handler == handlers.end() ? HttpServer::Response{.code = 404, .body = "not found\n"}
                                          : handler->second(),
                method == "GET");
}

// Listens on `address`, ip:port or [ip]:port. The socket.
absl::StatusOr<int> Listen(const std::string& address) {
  const auto failed = [&address](std::string_view reason) {
    return absl::UnavailableError(
        fmt::format("cannot listen on http_listen '{}': {}", address, reason));
  };
  const size_t colon = address.rfind(':');
  uint16_t port = 0;
  const char* const end = address.data() + address.size();
  if (colon == std::string::npos) return failed("it must be ip:port");
  const auto parsed = std::from_chars(address.data() + colon + 1, end, port);
  if (parsed.ptr != end || parsed.ec != std::errc()) {
    return failed("it must be ip:port, with a port of 0 .. 65535");
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  addrinfo hints = {};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = AI_PASSIVE | AI_NUMERICSERV;
  addrinfo* found = nullptr;
  if (const int code = getaddrinfo(host.c_str(), std::to_string(port).c_str(), &hints, &found);
      code != 0) {
    return failed(gai_strerror(code));
  }
  const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(found, freeaddrinfo);
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return failed(std::strerror(errno));
  const int one = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  if (bind(fd, found->ai_addr, found->ai_addrlen) != 0 || listen(fd, SOMAXCONN) != 0) {
    const std::string reason = std::strerror(errno);
    close(fd);
    return failed(reason);
  }
  return fd;
}

int PortOf(int fd) {
  sockaddr_storage address = {};
  socklen_t size = sizeof(address);
  if (getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) != 0) return 0;
  return ntohs(address.ss_family == AF_INET6
                   ? reinterpret_cast<const sockaddr_in6&>(address).sin6_port
                   : reinterpret_cast<const sockaddr_in&>(address).sin_port);
}

}  // namespace

// One thread, one poll: no client can keep another waiting, whatever it sends or does not read.
class HttpServer::Impl {
 public:
  Impl(int listener, std::map<std::string, Handler> handlers)
      : handlers_(std::move(handlers)),
        listener_(listener),
        port_(PortOf(listener)),
        stop_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)),
        thread_([this] { Run(); }) {}
  ~Impl() {
    const uint64_t one = 1;
    LATENTD_CHECK(write(stop_, &one, sizeof(one)) == sizeof(one));
    thread_.join();
    close(stop_);
    close(listener_);
  }

  int port() const { return port_; }

 private:
  void Run() {
    std::vector<pollfd> fds;
    while (true) {
      fds = {{.fd = stop_, .events = POLLIN, .revents = 0},
             {.fd = listener_, .events = POLLIN, .revents = 0}};
      for (const Connection& connection : connections_) {
        const bool writing = connection.sent < connection.out.size();
        fds.push_back({.fd = connection.fd,
                       .events = static_cast<int16_t>(writing ? POLLOUT : POLLIN),
                       .revents = 0});
      }
      poll(fds.data(), fds.size(), connections_.empty() ? -1 : 100);
      if (fds[0].revents != 0) break;
      const absl::Time now = absl::Now();
      size_t i = 2;
      for (auto connection = connections_.begin(); connection != connections_.end(); ++i) {
        const bool open = fds[i].revents == 0 || Advance(&*connection);
        connection = open && now < connection->deadline ? std::next(connection)
                                                        : connections_.erase(connection);
      }
      if (fds[1].revents != 0) Accept();
    }
    connections_.clear();
  }

  // The oldest client has to go where there are too many: probes must always come through.
  void Accept() {
    const int fd = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
      // Out of descriptors: the client stays in the queue; do not spin on it.
      if (errno == EMFILE || errno == ENFILE) absl::SleepFor(absl::Milliseconds(20));
      return;
    }
    if (connections_.size() >= kMaxConnections) connections_.pop_front();
    connections_.emplace_back(fd);
  }

  // Reads or writes what is possible now. False: the connection is done.
  bool Advance(Connection* connection) {
    if (connection->sent < connection->out.size()) {
      const ssize_t n = send(connection->fd, connection->out.data() + connection->sent,
                             connection->out.size() - connection->sent, MSG_NOSIGNAL);
      if (n < 0) return errno == EAGAIN || errno == EINTR;
      connection->sent += static_cast<size_t>(n);
      // The client closes next; closing first, with bytes of it unread, would reset the connection
      // and could cost it the answer.
      if (connection->sent == connection->out.size()) shutdown(connection->fd, SHUT_WR);
      return true;
    }
    char buffer[4096];
    const ssize_t n = recv(connection->fd, buffer, sizeof(buffer), 0);
    if (n < 0) return errno == EAGAIN || errno == EINTR;
    if (n == 0) return false;
    if (!connection->out.empty()) return true;  // answered; the rest is read and dropped
    connection->in.append(buffer, static_cast<size_t>(n));
    if (connection->in.find("\r\n\r\n") != std::string::npos) {
      connection->out = Answer(connection->in, handlers_);
    } else if (connection->in.size() > kMaxRequestBytes) {
      connection->out = Format({.code = 431, .body = "the request is too long\n"}, true);
    }
    return true;
  }

  const std::map<std::string, Handler> handlers_;
  const int listener_;
  const int port_;
  const int stop_;
  std::list<Connection> connections_;  // the thread's; oldest first
  std::thread thread_;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->port(); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(
    const std::string& address, std::map<std::string, Handler> handlers) {
  ASSIGN_OR_RETURN(const int listener, Listen(address));
  return std::unique_ptr<HttpServer>(
      new HttpServer(std::make_unique<Impl>(listener, std::move(handlers))));
}

}  // namespace latentd
