#ifndef LATENTD_SERVER_STREAM_H_
#define LATENTD_SERVER_STREAM_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/server_callback.h"
#include "server/generation_call.h"

namespace latentd {

// A client's call.
class RpcCall : public GenerationCall {
 public:
  // `context` lives until gRPC is done with the call.
  RpcCall(CallHost* host, grpc::CallbackServerContext* context, std::string_view method);

  void Refuse(const absl::Status& status) override;  // tells the observer

 protected:
  // The client has gone, or the deadline has passed.
  void Cancelled();
  // gRPC has let go: tells the observer, and the host.
  void Done();

 private:
  grpc::CallbackServerContext* const context_;
  const std::string_view method_;
  const absl::Time deadline_;  // InfiniteFuture: none
};

// A call whose answer is streamed as GenerationEvents. One write is in flight at a time; what comes
// meanwhile joins the next message, so a client that does not read holds no more than its own
// answer.
class StreamCall final : public RpcCall, public grpc::ServerWriteReactor<grpc::ByteBuffer> {
 public:
  using RpcCall::RpcCall;

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
class UnaryCall final : public WholeCall<Response, RpcCall>, public grpc::ServerUnaryReactor {
 public:
  // `response` lives until gRPC is done with the call.
  UnaryCall(CallHost* host, grpc::CallbackServerContext* context, std::string_view method,
            grpc::ByteBuffer* response)
      : WholeCall<Response, RpcCall>(host, context, method), response_(response) {}

 private:
  void OnCancel() override { this->Cancelled(); }
  void OnDone() override { this->Done(); }
  void Respond(Response response) override;
  void Close(const absl::Status& status) override;

  grpc::ByteBuffer* const response_;
};

extern template class UnaryCall<v1::ChatResponse>;
extern template class UnaryCall<v1::CompleteResponse>;

}  // namespace latentd

#endif  // LATENTD_SERVER_STREAM_H_
