#ifndef LATENTD_SERVER_HTTP_H_
#define LATENTD_SERVER_HTTP_H_

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace latentd {

// The small HTTP listener for probes and Prometheus: GET and HEAD of fixed paths, one request a
// connection. Handlers run on its one thread and must be quick; a silent or slow client is cut off
// after five seconds and keeps nobody waiting.
//
// Our own rather than a library's, because what the distribution has (civetweb) exists as a shared
// object only, gives each silent client a thread, and takes two seconds to stop.
class HttpServer {
 public:
  struct Response {
    int code = 200;
    std::string content_type = "text/plain; charset=utf-8";
    std::string body;
  };
  using Handler = std::function<Response()>;

  // Listens on `address` (ip:port; port 0 takes a free one) and answers the given paths.
  // UNAVAILABLE with the address and the reason when it cannot.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const std::string& address,
                                                           std::map<std::string, Handler> handlers);
  ~HttpServer();  // at once; clients that are connected are cut off

  int port() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_HTTP_H_
