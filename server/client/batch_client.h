#ifndef LATENTD_SERVER_CLIENT_BATCH_CLIENT_H_
#define LATENTD_SERVER_CLIENT_BATCH_CLIENT_H_

#include <chrono>
#include <functional>
#include <iosfwd>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "latentd/v1/batch.grpc.pb.h"
#include "server/client/connection.h"

namespace latentd {

// Where a batch command reads and writes: the process's own, or a test's.
struct BatchTerminal {
  int in_fd;
  bool err_is_terminal;  // then progress is a line that is rewritten
  std::ostream& out;
  std::ostream& err;
};

// Whom a batch command talks to, and as whom.
struct BatchConnection {
  ConnectionOptions connection;
  std::string owner;  // metadata latentd-owner; empty: the server goes by the address
};

// A connection to BatchService that outlives the server's end: every call may be repeated, and a
// server that has answered once is waited for when it is gone, up to --wait (60 s) without
// progress. One that never answered is waited for as `latentd chat` does.
class BatchClient {
 public:
  // All must outlive the client. Notices go to `err`.
  BatchClient(const BatchConnection& options, const Interrupts& interrupts, std::ostream& err);

  v1::BatchService::Stub& stub() { return *stub_; }
  const std::shared_ptr<grpc::Channel>& channel() const { return channel_; }
  const Interrupts& interrupts() const { return interrupts_; }
  std::ostream& err() { return err_; }

  // Puts the owner into a call's metadata.
  void Prepare(grpc::ClientContext* context) const;

  // Of a call that failed: true when it is worth another try, whose time has come.
  bool TryAgain(const grpc::Status& status);
  // Something new has come of the calls: the time to wait for the server begins anew.
  void Progressed();
  // A stream that began at `start` has ended: one that lasted was progress, even if it was silent.
  void StreamEnded(absl::Time start);
  // Called before the waiting for another try: the terminal's line must be left.
  void set_on_retry(std::function<void()> on_retry) { on_retry_ = std::move(on_retry); }

  // A unary call, tried again where that may help; CANCELLED on Ctrl-C.
  //   client.Call(&v1::BatchService::Stub::GetJob, request, &response)
  template <typename Request, typename Response>
  grpc::Status Call(grpc::Status (v1::BatchService::Stub::*method)(grpc::ClientContext*,
                                                                   const Request&, Response*),
                    const Request& request, Response* response) {
    while (true) {
      grpc::ClientContext context;
      Prepare(&context);
      context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
      const OnInterrupt cancel(interrupts_, [&context] { context.TryCancel(); });
      const grpc::Status status = (stub_.get()->*method)(&context, request, response);
      answered_ |= status.error_code() != grpc::StatusCode::UNAVAILABLE;
      if (status.ok() || !TryAgain(status)) return status;
    }
  }

 private:
  ConnectionOptions options_;
  const std::string owner_;
  const Interrupts& interrupts_;
  std::ostream& err_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::BatchService::Stub> stub_;
  bool answered_ = false;
  int failures_ = 0;  // since the last progress
  std::optional<ServerWait> wait_;
  std::function<void()> on_retry_ = [] {};
};

// The bytes of a message, the same in every process: entries of maps are sorted.
std::string SerializeDeterministic(const google::protobuf::MessageLite& message);

// As one line of JSON under the names of the .proto file.
std::string JsonLine(const google::protobuf::Message& message);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_CLIENT_H_
