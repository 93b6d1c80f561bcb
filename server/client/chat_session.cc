#include "server/client/chat_session.h"

#include <ostream>
#include <utility>

namespace latentd {
namespace {

v1::Message MakeMessage(v1::Role role, std::string content) {
  v1::Message message;
  message.set_role(role);
  message.set_content(std::move(content));
  return message;
}

}  // namespace

ChatSession::ChatSession(Options options, const Interrupts& interrupts, std::ostream& out,
                         std::ostream& err)
    : options_(std::move(options)),
      interrupts_(interrupts),
      out_(out),
      err_(err),
      channel_(MakeChannel(options_.connection)),
      stub_(v1::InferenceService::NewStub(channel_)) {}

int ChatSession::Say(std::string message) {
  // A message that got no answer is replaced: roles must take turns.
  if (!turns_.empty() && turns_.back().role() == v1::ROLE_USER) turns_.pop_back();
  turns_.push_back(MakeMessage(v1::ROLE_USER, std::move(message)));
  return Ask();
}

int ChatSession::Retry() {
  if (!turns_.empty() && turns_.back().role() == v1::ROLE_ASSISTANT) turns_.pop_back();
  if (turns_.empty()) {
    err_ << "nothing to retry: no message yet" << std::endl;
    return kExitUsage;
  }
  return Ask();
}

int ChatSession::Ask() {
  v1::ChatRequest request = options_.request;
  request.clear_messages();
  if (!options_.system.empty()) {
    *request.add_messages() = MakeMessage(v1::ROLE_SYSTEM, options_.system);
  }
  for (const v1::Message& turn : turns_) *request.add_messages() = turn;

  AnswerPrinter printer(options_.style, out_);
  ServerWait wait(options_.connection, *channel_, interrupts_, err_);
  grpc::Status status;
  bool answered = false;
  absl::Time sent;
  do {
    sent = absl::Now();
    status = Stream(request, printer, &answered);
  } while (!status.ok() && !answered && wait.TryAgain(status));
  printer.End();

  // Reasoning is not part of the history: the model's templates leave it out of later turns.
  const bool interrupted = interrupts_.pending();
  if (status.ok() || (interrupted && !printer.content().empty())) {
    turns_.push_back(MakeMessage(v1::ROLE_ASSISTANT, printer.content()));
  }
  if (!out_) {
    err_ << "error: cannot write the answer to standard output" << std::endl;
    return kExitFailed;
  }
  if (status.ok()) {
    if (options_.stats) err_ << printer.Stats(sent) << std::endl;
    return kExitOk;
  }
  if (interrupted) return kExitInterrupted;
  err_ << "error: " << DescribeError(status) << std::endl;
  return kExitFailed;
}

// One call. `*answered` becomes true with the first event: from then on a retry would repeat text.
grpc::Status ChatSession::Stream(const v1::ChatRequest& request, AnswerPrinter& printer,
                                 bool* answered) {
  grpc::ClientContext context;
  const OnInterrupt cancel(interrupts_, [&context] { context.TryCancel(); });
  const auto reader = stub_->StreamChat(&context, request);
  v1::GenerationEvent event;
  bool complete = false;
  while (reader->Read(&event)) {
    *answered = true;
    complete |= event.has_usage();
    printer.Print(event, absl::Now());
    if (!out_) context.TryCancel();  // nobody reads; the stream ends with the next Read
  }
  grpc::Status status = reader->Finish();
  if (status.ok() && !complete) {
    return {grpc::StatusCode::DATA_LOSS, "the stream ended before the answer was complete"};
  }
  return status;
}

}  // namespace latentd
