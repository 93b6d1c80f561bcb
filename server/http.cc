#include "server/http.h"

#include <civetweb.h>

#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "fmt/format.h"
#include "server/log.h"

namespace latentd {

class HttpServer::Impl {
 public:
  explicit Impl(std::map<std::string, Handler> handlers) : handlers_(std::move(handlers)) {}
  ~Impl() {
    if (context_ != nullptr) mg_stop(context_);
  }

  absl::Status Listen(const std::string& address) {
    mg_init_library(0);
    // A scrape takes a millisecond; more threads than one only because a silent client holds its
    // own until it is cut off.
    const char* options[] = {"listening_ports",
                             address.c_str(),
                             "num_threads",
                             "8",
                             "request_timeout_ms",
                             "2000",
                             "linger_timeout_ms",
                             "500",
                             "max_request_size",
                             "8192",
                             "enable_keep_alive",
                             "no",
                             nullptr};
    mg_callbacks callbacks = {};
    callbacks.begin_request = &Impl::OnRequest;
    callbacks.log_message = &Impl::OnMessage;
    context_ = mg_start(&callbacks, this, options);
    if (context_ == nullptr) {
      return absl::UnavailableError(fmt::format("cannot listen on http_listen '{}'{}{}", address,
                                                message_.empty() ? "" : ": ", message_));
    }
    mg_server_port ports[1] = {};
    if (mg_get_server_ports(context_, 1, ports) == 1) port_ = ports[0].port;
    return absl::OkStatus();
  }

  int port() const { return port_; }

 private:
  static int OnMessage(const mg_connection* connection, const char* message) {
    auto* self = static_cast<Impl*>(mg_get_user_data(mg_get_context(connection)));
    if (self != nullptr && self->context_ == nullptr) {
      self->message_ = message;  // why mg_start() is about to fail
    } else {
      LogEvent(spdlog::level::debug, message, {{"source", "http"}});
    }
    return 1;
  }

  static int OnRequest(mg_connection* connection) {
    const mg_request_info* info = mg_get_request_info(connection);
    auto* self = static_cast<Impl*>(info->user_data);
    const std::string_view method = info->request_method;
    const auto handler = self->handlers_.find(info->local_uri == nullptr ? "" : info->local_uri);
    Response response;
    if (method != "GET" && method != "HEAD") {
      response = {.code = 405, .body = "only GET and HEAD\n"};
    } else if (handler == self->handlers_.end()) {
      response = {.code = 404, .body = "not found\n"};
    } else {
      response = handler->second();
    }
    const std::string head = fmt::format(
        "HTTP/1.1 {} {}\r\nContent-Type: {}\r\nContent-Length: {}\r\nCache-Control: no-store\r\n"
        "Connection: close\r\n\r\n",
        response.code, mg_get_response_code_text(connection, response.code), response.content_type,
        response.body.size());
    mg_write(connection, head.data(), head.size());
    if (method == "GET") mg_write(connection, response.body.data(), response.body.size());
    return response.code;
  }

  const std::map<std::string, Handler> handlers_;
  std::string message_;
  mg_context* context_ = nullptr;
  int port_ = 0;
};

HttpServer::HttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
HttpServer::~HttpServer() = default;

int HttpServer::port() const { return impl_->port(); }

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(
    const std::string& address, std::map<std::string, Handler> handlers) {
  auto impl = std::make_unique<Impl>(std::move(handlers));
  if (absl::Status status = impl->Listen(address); !status.ok()) return status;
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(impl)));
}

}  // namespace latentd
