#ifndef LATENTD_SERVER_CLIENT_CONNECTION_H_
#define LATENTD_SERVER_CLIENT_CONNECTION_H_

#include <grpcpp/grpcpp.h>

#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/client/interrupts.h"

namespace CLI {
class App;
}

namespace latentd {

// Exit codes of the client commands.
inline constexpr int kExitOk = 0;
inline constexpr int kExitFailed = 1;         // the server, the network, or too many errors
inline constexpr int kExitUsage = 2;          // an option or an argument is wrong
inline constexpr int kExitInterrupted = 130;  // Ctrl-C: 128 + SIGINT

struct ConnectionOptions {
  std::string target = "127.0.0.1:50051";  // host:port, or any other gRPC target (unix:/path)
  // How long to wait for a server that says it is loading or restarting. Unset: 60 s, and a server
  // that does not listen at all is an error at once.
  std::optional<double> wait_s = std::nullopt;
};

// Adds --target and --wait.
void AddConnectionOptions(CLI::App& app, ConnectionOptions* options);

// Refuses an empty target and a wait that is negative or not finite.
absl::Status ValidateConnectionOptions(const ConnectionOptions& options);

// A channel of its own: two calls with the same options share no connection. Connects lazily, takes
// answers of any size and tries again within a second where a connection fails.
std::shared_ptr<grpc::Channel> MakeChannel(const ConnectionOptions& options);

// One line: code, reason, message, the fields that were refused and when to try again:
//   INVALID_ARGUMENT: bad request (sampling.temperature: 3 is not in [0, 2])
std::string DescribeError(const grpc::Status& status);

// The canonical code in capitals: "UNAVAILABLE"; "CODE_99" for an unknown one.
std::string CodeName(grpc::StatusCode code);

// The fields that the server's google.rpc.BadRequest names, each with what is wrong.
std::vector<std::pair<std::string, std::string>> FieldViolations(const grpc::Status& status);

// What the server's google.rpc.RetryInfo says, if it sent one.
std::optional<absl::Duration> RetryDelay(const grpc::Status& status);

// Decides whether a call that failed is worth another try, and waits for it.
class ServerWait {
 public:
  // The time to wait starts now. `channel` is the one that calls use. All four must outlive the
  // object. Notices go to `err`.
  ServerWait(const ConnectionOptions& options, grpc::Channel& channel, const Interrupts& interrupts,
             std::ostream& err);

  // True: `status` says that the server is not ready yet, and the time to try again has come.
  // False: it is a final answer, the time is over, or Ctrl-C is pending.
  bool TryAgain(const grpc::Status& status);

 private:
  bool WaitForConnection();

  const ConnectionOptions& options_;
  grpc::Channel& channel_;
  const Interrupts& interrupts_;
  std::ostream& err_;
  const absl::Time end_;
  std::string last_notice_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_CONNECTION_H_
