#ifndef LATENTD_SERVER_CLIENT_CHAT_SESSION_H_
#define LATENTD_SERVER_CLIENT_CHAT_SESSION_H_

#include <grpcpp/grpcpp.h>

#include <iosfwd>
#include <memory>
#include <string>
#include <vector>

#include "latentd/v1/inference.grpc.pb.h"
#include "server/client/answer_printer.h"
#include "server/client/connection.h"
#include "server/client/interrupts.h"

namespace latentd {

// A conversation with a server: the turns so far, and how to ask for the next. Answers go to `out`,
// everything else (notices, errors, figures) to `err`. Not thread-safe.
class ChatSession {
 public:
  struct Options {
    ConnectionOptions connection;
    v1::ChatRequest request;  // model, sampling, limits, thinking; `messages` is the session's
    std::string system;       // empty: no system message
    PrintStyle style;
    bool stats = false;  // figures on `err` after each answer
  };

  // All references must outlive the session.
  ChatSession(Options options, const Interrupts& interrupts, std::ostream& out, std::ostream& err);

  // Asks, prints the answer as it arrives and adds both to the history. On Ctrl-C the call is
  // cancelled, and what has come stays in the history. An error is printed, and the message stays
  // for Retry(). Returns the exit code that this answer deserves.
  int Say(std::string message);

  // Asks for the last message again, without the answer it got. kExitUsage when there is none.
  int Retry();

  // Forgets the turns; system message and options stay.
  void Reset() { turns_.clear(); }

  Options& options() { return options_; }
  const std::vector<v1::Message>& turns() const { return turns_; }

 private:
  int Ask();
  grpc::Status Stream(const v1::ChatRequest& request, AnswerPrinter& printer, bool* answered);

  Options options_;
  const Interrupts& interrupts_;
  std::ostream& out_;
  std::ostream& err_;
  const std::shared_ptr<grpc::Channel> channel_;
  const std::unique_ptr<v1::InferenceService::Stub> stub_;
  std::vector<v1::Message> turns_;  // user and assistant in turn; the last may be unanswered
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_CHAT_SESSION_H_
