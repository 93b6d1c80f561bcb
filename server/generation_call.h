#ifndef LATENTD_SERVER_GENERATION_CALL_H_
#define LATENTD_SERVER_GENERATION_CALL_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "latentd/v1/inference.pb.h"
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
  // gRPC has let go of a client's call.
  virtual void OnCallDone(GenerationCall* call) = 0;
  virtual RequestObserver& observer() = 0;
};

// One generating call from its arrival to its end, whoever ends it: the answer, a refusal, the
// caller, the deadline, a failing core, the daemon. The first end counts. Thread-safe.
//
//   any thread     constructs it, ends it
//   worker thread  Begin, Submitting, Submitted, or Refuse
//   output thread  AnswerSink's methods
//
// What becomes of the answer, and who called, are its subclasses' business. Memory: held by the
// service until it is over for the caller too, and by whoever of these works on it.
class GenerationCall : public AnswerSink, public std::enable_shared_from_this<GenerationCall> {
 public:
  // `host` must outlive the call.
  explicit GenerationCall(CallHost* host) : host_(host), arrival_(absl::Now()) {}

  absl::Time arrival() const { return arrival_; }
  bool ended() const;

  // The request has been checked; `model_name` is the served model's.
  void Begin(const GenerationRequest& request, const std::string& model_name);
  // It goes to the core under this id; from now on the end of the call cancels it there.
  void Submitting(RequestId id);
  // The core has taken it. Cancels it at once when the call has ended meanwhile.
  void Submitted(RequestId id);
  // It never reached the core.
  virtual void Refuse(const absl::Status& status) { Abort(status); }
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

  // The answer is complete. False when the call has ended already.
  bool End(const Answer& answer) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  const Head& head() const { return head_; }
  CallHost& host() { return *host_; }
  std::map<std::string, std::string> TakeMetadata() { return std::move(metadata_); }

  mutable absl::Mutex mutex_;
  AnswerProgress progress_ ABSL_GUARDED_BY(mutex_);
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mutex_);
  std::string_view finish_reason_ ABSL_GUARDED_BY(mutex_);

 private:
  CallHost* const host_;
  const absl::Time arrival_;
  Head head_;
  std::map<std::string, std::string> metadata_;
  RequestId id_ ABSL_GUARDED_BY(mutex_) = 0;  // 0: not submitted
};

v1::FinishReason ToProto(FinishReason reason);

void FillUsage(int32_t prompt_tokens, absl::Time arrival, const AnswerProgress& progress,
               v1::Usage* usage);

// Finished and Choice share these fields by name.
template <typename Proto>
void FillFinish(const Answer& answer, Proto* proto) {
  proto->set_finish_reason(ToProto(answer.finish_reason()));
  proto->set_stop_matched(answer.stop_matched());
  if (answer.stop_token_id()) proto->set_stop_token_id(*answer.stop_token_id());
}

// A call whose answer is given whole. `Response` is ChatResponse or CompleteResponse, `Base` a
// GenerationCall.
template <typename Response, typename Base>
class WholeCall : public Base {
 public:
  using Base::Base;

  void OnStarted(const AnswerProgress& progress) override {
    choice_.mutable_message()->set_role(v1::ROLE_ASSISTANT);
    if (!this->head().echo.empty()) choice_.mutable_message()->set_content(this->head().echo);
    absl::MutexLock lock(&this->mutex_);
    this->progress_ = progress;
  }

  void OnPiece(TokenId token, AnswerPiece piece, const AnswerProgress& progress) override {
    Add(token, piece);
    absl::MutexLock lock(&this->mutex_);
    this->progress_ = progress;
  }

  void OnFinished(TokenId token, AnswerPiece piece, const AnswerProgress& progress,
                  const Answer& answer) override {
    Add(token, piece);
    {
      absl::MutexLock lock(&this->mutex_);
      if (!this->End(answer)) return;
      this->progress_ = progress;
    }
    v1::Message* message = choice_.mutable_message();
    if (!message->has_reasoning()) message->mutable_content();  // an empty answer is one
    FillFinish(answer, &choice_);
    Response response;
    response.set_request_id(this->head().request_id);
    response.set_model(this->head().model);
    *response.add_choices() = std::move(choice_);
    FillUsage(this->head().prompt_tokens, this->arrival(), progress, response.mutable_usage());
    response.set_seed(this->head().seed);
    Respond(std::move(response));
  }

 protected:
  // Called once, without the lock, when the call has ended by a finished answer.
  virtual void Respond(Response response) = 0;

 private:
  void Add(TokenId token, const AnswerPiece& piece) {
    v1::Message* message = choice_.mutable_message();
    if (!piece.reasoning.empty()) message->mutable_reasoning()->append(piece.reasoning);
    if (!piece.content.empty()) message->mutable_content()->append(piece.content);
    if (this->head().send_token_ids) choice_.add_token_ids(token);
  }

  v1::Choice choice_;  // output thread
};

}  // namespace latentd

#endif  // LATENTD_SERVER_GENERATION_CALL_H_
