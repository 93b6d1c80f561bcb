#ifndef LATENTD_SERVER_STREAM_H_
#define LATENTD_SERVER_STREAM_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "scheduler/request.h"
#include "server/output_processor.h"
#include "server/request_builder.h"
#include "server/request_observer.h"

namespace latentd {

class GenerationCall;

// What a generating call needs of the service. Thread-safe; must outlive its calls.
class CallHost {
 public:
  virtual ~CallHost() = default;

  // Ends a request in the core and in the output processor; nobody waits for it any more.
  virtual void CancelRequest(RequestId id) = 0;
  // gRPC has let go of the call.
  virtual void OnCallDone(GenerationCall* call) = 0;
  virtual RequestObserver& observer() = 0;
};

// One generating call from its arrival to its end, whoever ends it: the answer, a refusal, the
// client, the deadline, a failing core, the daemon. The first end counts. Thread-safe.
//
//   gRPC thread    constructs it, tells it that the client has gone
//   worker thread  Begin, Submitting, Submitted, or Refuse
//   output thread  AnswerSink's methods
//
// Memory: held by itself until gRPC is done with it (OnDone), and by whoever of these works on it.
class GenerationCall : public AnswerSink, public std::enable_shared_from_this<GenerationCall> {
 public:
  GenerationCall(CallHost* host, grpc::CallbackServerContext* context, std::string_view method);

  absl::Time arrival() const { return arrival_; }
  absl::Time deadline() const { return deadline_; }  // InfiniteFuture: none
  bool ended() const;

  // The request has been checked; `model_name` is the served model's.
  void Begin(const GenerationRequest& request, const std::string& model_name);
  // It goes to the core under this id; from now on the end of the call cancels it there.
  void Submitting(RequestId id);
  // The core has taken it. Cancels it at once when the call has ended meanwhile.
  void Submitted(RequestId id);
  // It never reached the core.
  void Refuse(const absl::Status& status);
  // Ends it from outside. No-op when it has ended.
  void Abort(const absl::Status& status);

  void OnFailed(const absl::Status& status) override;

 protected:
  // What the answer's head says; set by Begin, before the output thread hears of the request.
  struct Head {
    std::string request_id;
    std::string model;
    int32_t prompt_tokens = 0;
    uint64_t seed = 0;
    bool send_token_ids = false;
    std::string echo;
  };

  // Called once, without the lock, when the call has ended otherwise than by a finished answer.
  virtual void Close(const absl::Status& status) = 0;

  // The client has gone, or the deadline has passed.
  void Cancelled();
  // The answer is complete. False when the call has ended already.
  bool End(const Answer& answer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // gRPC has let go: tells the observer, forgets itself.
  void Done();

  const Head& head() const { return head_; }

  mutable absl::Mutex mutex_;
  AnswerProgress progress_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);

 private:
  CallHost* const host_;
  grpc::CallbackServerContext* const context_;
  const std::string_view method_;
  const absl::Time arrival_;
  const absl::Time deadline_;
  Head head_;
  std::map<std::string, std::string> metadata_;
  std::string_view finish_reason_ ABSL_GUARDED_BY(mutex_);
  RequestId id_ ABSL_GUARDED_BY(mutex_) = 0;  // 0: not submitted
};

// A call whose answer is streamed as GenerationEvents. One write is in flight at a time; what comes
// meanwhile joins the next message, so a client that does not read holds no more than its own
// answer.
class StreamCall final : public GenerationCall, public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  using GenerationCall::GenerationCall;

  void OnStarted(const AnswerProgress& progress) override;
  void OnPiece(TokenId token, AnswerPiece piece, const AnswerProgress& progress) override;
  void OnFinished(TokenId token, AnswerPiece piece, const AnswerProgress& progress,
                  const Answer& answer) override;

 private:
  void OnCancel() override { Cancelled(); }
  void OnWriteDone(bool ok) override;
  void OnDone() override { Done(); }
  void Close(const absl::Status& status) override;

  void Add(TokenId token, const AnswerPiece& piece) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The event that text of this part joins, or a new one.
  v1::GenerationEvent::Delta* DeltaFor(v1::GenerationEvent::Delta::PartCase part)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // Writes the next event, or finishes the call, if it is time.
  void Advance();

  // Events [next_, size) are to be written; those before are, and are cleared together.
  google::protobuf::RepeatedPtrField<v1::GenerationEvent> outbox_ ABSL_GUARDED_BY(mutex_);
  int next_ ABSL_GUARDED_BY(mutex_) = 0;
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;  // gRPC has been told the status
  grpc::ByteBuffer in_flight_;                   // belongs to gRPC while writing_
};

// A call whose answer is sent whole. `Response` is ChatResponse or CompleteResponse.
template <typename Response>
class UnaryCall final : public GenerationCall, public grpc::ServerUnaryReactor {
 public:
  // `response` lives until gRPC is done with the call.
  UnaryCall(CallHost* host, grpc::CallbackServerContext* context, std::string_view method,
            grpc::ByteBuffer* response)
      : GenerationCall(host, context, method), response_(response) {}

  void OnStarted(const AnswerProgress& progress) override;
  void OnPiece(TokenId token, AnswerPiece piece, const AnswerProgress& progress) override;
  void OnFinished(TokenId token, AnswerPiece piece, const AnswerProgress& progress,
                  const Answer& answer) override;

 private:
  void OnCancel() override { Cancelled(); }
  void OnDone() override { Done(); }
  void Close(const absl::Status& status) override;

  void Add(TokenId token, const AnswerPiece& piece);

  grpc::ByteBuffer* const response_;
  v1::Choice choice_;  // output thread
};

extern template class UnaryCall<v1::ChatResponse>;
extern template class UnaryCall<v1::CompleteResponse>;

}  // namespace latentd

#endif  // LATENTD_SERVER_STREAM_H_
