#include "server/generation_call.h"

namespace latentd {
namespace {

void SetDuration(absl::Duration duration, google::protobuf::Duration* proto) {
  if (duration < absl::ZeroDuration()) duration = absl::ZeroDuration();  // the clock was set back
  proto->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

}  // namespace

v1::FinishReason ToProto(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return v1::FINISH_REASON_STOP;
    case FinishReason::kLength:
      return v1::FINISH_REASON_LENGTH;
    case FinishReason::kNone:
    case FinishReason::kError:
      break;
  }
  return v1::FINISH_REASON_UNSPECIFIED;
}

void FillUsage(int32_t prompt_tokens, absl::Time arrival, const AnswerProgress& progress,
               v1::Usage* usage) {
  usage->set_prompt_tokens(prompt_tokens);
  usage->set_cached_tokens(progress.cached_tokens);
  usage->set_completion_tokens(progress.completion_tokens);
  usage->set_reasoning_tokens(progress.reasoning_tokens);
  v1::Timings* timings = usage->mutable_timings();
  SetDuration(progress.started - arrival, timings->mutable_queue_duration());
  SetDuration(progress.first_token - progress.started, timings->mutable_prefill_duration());
  SetDuration(progress.last_token - progress.first_token, timings->mutable_decode_duration());
}

bool GenerationCall::ended() const {
  absl::MutexLock lock(&mutex_);
  return end_.has_value();
}

void GenerationCall::Begin(const GenerationRequest& request, const std::string& model_name) {
  absl::MutexLock lock(&mutex_);
  head_ = {.request_id = request.request_id,
           .model = model_name,
           .prompt_tokens = static_cast<int32_t>(request.core.prompt.size()),
           .seed = request.core.sampling.seed,
           .send_token_ids = request.send_token_ids,
           .echo = request.echo};
  metadata_ = request.metadata;
}

void GenerationCall::Submitting(RequestId id) {
  absl::MutexLock lock(&mutex_);
  id_ = id;
}

void GenerationCall::Submitted(RequestId id) {
  if (ended()) host_->CancelRequest(id);
}

void GenerationCall::Abort(const absl::Status& status) {
  RequestId id;
  {
    absl::MutexLock lock(&mutex_);
    if (end_) return;
    end_ = status;
    id = id_;
  }
  if (id != 0) host_->CancelRequest(id);
  Close(status);
}

void GenerationCall::OnFailed(const absl::Status& status) {
  {
    absl::MutexLock lock(&mutex_);
    if (end_) return;
    end_ = status;
  }
  Close(status);
}

bool GenerationCall::End(const Answer& answer) {
  if (end_) return false;
  end_ = absl::OkStatus();
  finish_reason_ = answer.finish_reason() == FinishReason::kStop ? "stop" : "length";
  return true;
}

}  // namespace latentd
