#include "server/stream.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "grpcpp/server_context.h"
#include "server/status.h"
#include "server/wire.h"

namespace latentd {
namespace {

constexpr absl::Duration kDeadlineRounding = absl::Milliseconds(10);

// Joined text is sent in messages of about this size, far below any client's limit.
constexpr size_t kMaxJoinedBytes = 64 << 10;

absl::Time ToAbslTime(std::chrono::system_clock::time_point time) {
  return time == std::chrono::system_clock::time_point::max() ? absl::InfiniteFuture()
                                                              : absl::FromChrono(time);
}

}  // namespace

// ---- RpcCall -----------------------------------------------------------------------------------

RpcCall::RpcCall(CallHost* host, grpc::CallbackServerContext* context, std::string_view method)
    : GenerationCall(host),
      context_(context),
      method_(method),
      deadline_(ToAbslTime(context->deadline())) {}

void RpcCall::Refuse(const absl::Status& status) {
  host().observer().OnRejected(ErrorReason(status));
  Abort(status);
}

void RpcCall::Cancelled() {
  // gRPC says only that it is over. An expired deadline is the one reason that we can tell; the
  // client's own clock sees it first, as what is sent of it is rounded up.
  if (absl::Now() + kDeadlineRounding >= deadline_) {
    Abort(MakeError(absl::StatusCode::kDeadlineExceeded, "DEADLINE_EXCEEDED",
                    "the call's deadline has passed"));
  } else {
    Abort(MakeError(absl::StatusCode::kCancelled, "CANCELLED", "the client cancelled the call"));
  }
}

void RpcCall::Done() {
  RequestRecord record;
  {
    absl::MutexLock lock(&mutex_);
    LATENTD_CHECK(end_.has_value());
    // The answer was complete, but the client went before it had all of it.
    const bool lost = end_->ok() && context_->IsCancelled();
    record = {.method = method_,
              .request_id = head().request_id,
              .metadata = TakeMetadata(),
              .code = lost ? absl::StatusCode::kCancelled : end_->code(),
              .reason = lost ? "CANCELLED" : ErrorReason(*end_),
              .finish_reason = finish_reason_,
              .prompt_tokens = head().prompt_tokens,
              .cached_tokens = progress_.cached_tokens,
              .completion_tokens = progress_.completion_tokens,
              .reasoning_tokens = progress_.reasoning_tokens,
              .total = absl::Now() - arrival(),
              .queue = std::nullopt,
              .time_to_first_token = std::nullopt,
              .decode = std::nullopt};
    if (progress_.started != absl::InfiniteFuture()) record.queue = progress_.started - arrival();
    if (progress_.completion_tokens > 0) {
      record.time_to_first_token = progress_.first_token - arrival();
    }
    if (progress_.completion_tokens > 1) {
      record.decode = progress_.last_token - progress_.first_token;
    }
  }
  host().observer().OnFinished(record);
  host().OnCallDone(this);
}

// ---- StreamCall
// ----------------------------------------------------------------------------------

void StreamCall::OnStarted(const AnswerProgress& progress) {
  {
    absl::MutexLock lock(&mutex_);
    if (end_) return;
    progress_ = progress;
    auto* started = outbox_.Add()->mutable_started();
    started->set_request_id(head().request_id);
    started->set_model(head().model);
    started->set_prompt_tokens(head().prompt_tokens);
    started->set_cached_tokens(progress.cached_tokens);
    started->set_seed(head().seed);
    if (!head().echo.empty()) outbox_.Add()->mutable_delta()->set_content(head().echo);
  }
  Advance();
}

void StreamCall::OnPiece(TokenId token, AnswerPiece piece, const AnswerProgress& progress) {
  {
    absl::MutexLock lock(&mutex_);
    if (end_) return;
    progress_ = progress;
    Add(token, piece);
  }
  Advance();
}

void StreamCall::OnFinished(TokenId token, AnswerPiece piece, const AnswerProgress& progress,
                            const Answer& answer) {
  {
    absl::MutexLock lock(&mutex_);
    if (!End(answer)) return;
    progress_ = progress;
    Add(token, piece);
    FillFinish(answer, outbox_.Add()->mutable_finished());
    FillUsage(head().prompt_tokens, arrival(), progress, outbox_.Add()->mutable_usage());
  }
  Advance();
}

v1::GenerationEvent::Delta* StreamCall::DeltaFor(v1::GenerationEvent::Delta::PartCase part) {
  using Delta = v1::GenerationEvent::Delta;
  if (next_ < outbox_.size() && outbox_[outbox_.size() - 1].has_delta()) {
    Delta* last = outbox_[outbox_.size() - 1].mutable_delta();
    const size_t joined = last->content().size() + last->reasoning().size() +
                          last->token_ids_size() * sizeof(TokenId);
    const bool same = part == Delta::PART_NOT_SET || last->part_case() == Delta::PART_NOT_SET ||
                      last->part_case() == part;
    if (same && joined < kMaxJoinedBytes) return last;
  }
  return outbox_.Add()->mutable_delta();
}

void StreamCall::Add(TokenId token, const AnswerPiece& piece) {
  using Delta = v1::GenerationEvent::Delta;
  Delta* delta = nullptr;
  if (!piece.reasoning.empty()) {
    delta = DeltaFor(Delta::kReasoning);
    delta->mutable_reasoning()->append(piece.reasoning);
  }
  if (!piece.content.empty()) {
    delta = DeltaFor(Delta::kContent);
    delta->mutable_content()->append(piece.content);
  }
  if (head().send_token_ids) {
    if (delta == nullptr) delta = DeltaFor(Delta::PART_NOT_SET);
    delta->add_token_ids(token);
  }
}

void StreamCall::Advance() {
  bool write_and_finish = false;
  std::optional<absl::Status> finish;
  {
    absl::MutexLock lock(&mutex_);
    if (writing_ || closed_) return;
    if (end_ && !end_->ok()) next_ = outbox_.size();  // nothing more is sent
    if (next_ == outbox_.size()) {
      if (!end_) return;
      finish = end_;
    } else {
      in_flight_ = Encode(outbox_[next_++]);
      writing_ = true;
      write_and_finish = end_.has_value() && next_ == outbox_.size();
    }
    if (next_ == outbox_.size()) {
      outbox_.Clear();
      next_ = 0;
    }
    closed_ = finish.has_value() || write_and_finish;
  }
  // Outside the lock: only one thread gets here at a time, the one that set writing_ or closed_.
  if (finish) {
    Finish(ToGrpcStatus(*finish));
  } else if (write_and_finish) {
    StartWriteAndFinish(&in_flight_, grpc::WriteOptions(), grpc::Status::OK);
  } else {
    StartWrite(&in_flight_);
  }
}

void StreamCall::OnWriteDone(bool ok) {
  // After a failed write gRPC tells OnCancel as well, which ends the call.
  if (!ok) Cancelled();
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
  }
  Advance();
}

void StreamCall::Close(const absl::Status&) { Advance(); }

// ---- UnaryCall
// -----------------------------------------------------------------------------------

template <typename Response>
void UnaryCall<Response>::Respond(Response response) {
  *response_ = Encode(response);
  Finish(grpc::Status::OK);
}

template <typename Response>
void UnaryCall<Response>::Close(const absl::Status& status) {
  Finish(ToGrpcStatus(status));
}

template class UnaryCall<v1::ChatResponse>;
template class UnaryCall<v1::CompleteResponse>;

}  // namespace latentd
