#ifndef LATENTD_SERVER_HTTP_H_
#define LATENTD_SERVER_HTTP_H_

#include <functional>
#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace latentd {

// The small HTTP listener for probes and Prometheus. GET and HEAD of fixed paths, nothing else;
// slow or silent clients are cut off. Handlers run on the listener's own threads.
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
  ~HttpServer();  // ends running requests first

  int port() const;

 private:
  class Impl;
  explicit HttpServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_HTTP_H_
