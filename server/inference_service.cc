#include "server/inference_service.h"

#include <atomic>
#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/status.h"
#include "latentd/v1/inference.grpc.pb.h"
#include "server/local_call.h"
#include "server/local_caller.h"
#include "server/output_processor.h"
#include "server/request_builder.h"
#include "server/status.h"
#include "server/stream.h"
#include "server/wire.h"
#include "server/worker_pool.h"

namespace latentd {
namespace {

// Raw: gRPC hands us bytes; wire.h says why.
template <typename Service>
using Raw = v1::InferenceService::WithRawCallbackMethod_Chat<
    v1::InferenceService::WithRawCallbackMethod_StreamChat<
        v1::InferenceService::WithRawCallbackMethod_Complete<
            v1::InferenceService::WithRawCallbackMethod_StreamComplete<
                v1::InferenceService::WithRawCallbackMethod_RenderChat<
                    v1::InferenceService::WithRawCallbackMethod_Tokenize<
                        v1::InferenceService::WithRawCallbackMethod_Detokenize<
                            v1::InferenceService::WithRawCallbackMethod_GetModel<
                                v1::InferenceService::WithRawCallbackMethod_ListModels<
                                    Service>>>>>>>>>;

absl::Status Overloaded(absl::string_view what, int64_t limit) {
  return MakeError(absl::StatusCode::kResourceExhausted, "TOO_MANY_REQUESTS",
                   absl::StrCat(limit, " ", what, ": no more are taken"),
                   {{"limit", absl::StrCat(limit)}});
}

// The core says what; clients need a reason to tell one refusal from the other.
absl::Status ExplainSubmit(const absl::Status& status) {
  absl::string_view reason;
  switch (status.code()) {
    case absl::StatusCode::kResourceExhausted:
      reason = "QUEUE_FULL";
      break;
    case absl::StatusCode::kInvalidArgument:
      reason = "REQUEST_TOO_LARGE";
      break;
    case absl::StatusCode::kUnavailable:
      reason = "STOPPED";
      break;
    default:
      return status;
  }
  return MakeError(status.code(), reason, status.message());
}

}  // namespace

class InferenceService::Impl final : public Raw<v1::InferenceService::Service>,
                                     public CallHost,
                                     public LocalCaller {
 public:
  Impl(const ServiceOptions& options, RequestObserver* observer)
      : options_(options),
        observer_(observer),
        outputs_(MakeOutputs(options.num_output_threads)),
        workers_(options.num_workers, options.max_queued_calls),
        local_workers_(1, options.max_queued_calls) {}

  void SetServing(std::shared_ptr<const ServedModel> model, EngineCore* core);
  void HandleEvents(std::vector<SequenceEvent> events);
  void StartDrain() { draining_ = true; }
  int32_t num_active() const;
  void AbortAll(const absl::Status& status);

  // CallHost
  void CancelRequest(RequestId id) override;
  void OnCallDone(GenerationCall* call) override;
  RequestObserver& observer() override { return *observer_; }

  // LocalCaller
  int32_t capacity() const override;
  void Start(CallId id, LocalRequest request, const LocalCaller::Options& options,
             Done done) override;
  void Cancel(CallId id) override;

  // v1::InferenceService
  grpc::ServerUnaryReactor* Chat(grpc::CallbackServerContext* context,
                                 const grpc::ByteBuffer* request,
                                 grpc::ByteBuffer* response) override {
    return Take<v1::ChatRequest>(
        std::make_shared<UnaryCall<v1::ChatResponse>>(this, context, "Chat", response), *request);
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* StreamChat(grpc::CallbackServerContext* context,
                                                         const grpc::ByteBuffer* request) override {
    return Take<v1::ChatRequest>(std::make_shared<StreamCall>(this, context, "StreamChat"),
                                 *request);
  }
  grpc::ServerUnaryReactor* Complete(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override {
    return Take<v1::CompleteRequest>(
        std::make_shared<UnaryCall<v1::CompleteResponse>>(this, context, "Complete", response),
        *request);
  }
  grpc::ServerWriteReactor<grpc::ByteBuffer>* StreamComplete(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override {
    return Take<v1::CompleteRequest>(std::make_shared<StreamCall>(this, context, "StreamComplete"),
                                     *request);
  }
  grpc::ServerUnaryReactor* RenderChat(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Tokenize(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* Detokenize(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;

 private:
  using ModelPtr = std::shared_ptr<const ServedModel>;
  using BuildFunction = std::function<absl::StatusOr<GenerationRequest>(const ServedModel&)>;

  std::vector<std::unique_ptr<OutputProcessor>> MakeOutputs(int num_threads);
  // The one that has the request.
  OutputProcessor& OutputOf(RequestId id) { return *outputs_[id % outputs_.size()]; }

  absl::StatusOr<GenerationRequest> BuildFrom(const v1::ChatRequest& proto,
                                              const ServedModel& model) const {
    return BuildChat(proto, model, options_.allow_request_chat_template);
  }
  absl::StatusOr<GenerationRequest> BuildFrom(const v1::CompleteRequest& proto,
                                              const ServedModel& model) const {
    return BuildCompletion(proto, model);
  }
  absl::StatusOr<GenerationRequest> BuildLocal(const LocalRequest& request,
                                               const LocalCaller::Options& options,
                                               const ServedModel& model) const;

  // The model, unless it is not loaded yet or the server drains.
  absl::StatusOr<ModelPtr> Serving() const;

  // Takes a client's generating call in, and has a worker prepare it.
  template <typename Proto, typename Call>
  Call* Take(std::shared_ptr<Call> call, const grpc::ByteBuffer& bytes) {
    TakeCall(call, [this, bytes](const ServedModel& model) -> absl::StatusOr<GenerationRequest> {
      ASSIGN_OR_RETURN(const Proto proto, Parse<Proto>(bytes));
      return BuildFrom(proto, model);
    });
    return call.get();  // held by calls_ until gRPC is done with it
  }
  void TakeCall(std::shared_ptr<GenerationCall> call, BuildFunction build);
  void PrepareOn(WorkerPool* workers, std::shared_ptr<GenerationCall> call, BuildFunction build);
  // On a worker thread.
  void Prepare(const std::shared_ptr<GenerationCall>& call, const BuildFunction& build);
  absl::Status Submit(const std::shared_ptr<GenerationCall>& call, GenerationRequest request);

  // A call that generates nothing: parse, `answer`, encode, on a worker thread.
  template <typename Request, typename Response>
  grpc::ServerUnaryReactor* Answer(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
      grpc::ByteBuffer* response,
      std::function<absl::Status(const Request&, const ServedModel&, Response*)> answer);

  const ServiceOptions options_;
  RequestObserver* const observer_;
  std::atomic<EngineCore*> core_ = nullptr;
  std::atomic<bool> draining_ = false;
  std::atomic<RequestId> last_id_ = 0;

  mutable absl::Mutex mutex_;
  ModelPtr model_ ABSL_GUARDED_BY(mutex_);  // null while loading
  absl::flat_hash_map<GenerationCall*, std::shared_ptr<GenerationCall>> calls_
      ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<CallId, std::shared_ptr<GenerationCall>> local_calls_ ABSL_GUARDED_BY(mutex_);

  const std::vector<std::unique_ptr<OutputProcessor>> outputs_;
  // Last: their threads use all of the above.
  WorkerPool workers_;
  WorkerPool local_workers_;  // apart: clients do not wait behind those of this process
};

namespace {

void FillModel(const ServedModel& model, v1::Model* proto) {
  proto->set_name(model.name);
  proto->set_architecture(model.architecture);
  proto->set_max_model_len(model.max_model_len);
  proto->set_vocab_size(model.vocab_size);
  proto->set_weights_hash(model.weights_hash);
  proto->set_kv_cache_tokens(model.kv_cache_tokens);
  if (model.chat_template != nullptr) {
    proto->add_capabilities("chat");
    const std::string& source = model.tokenizer->chat_template();
    if (source.find("thinking") != source.npos || source.find("</think>") != source.npos) {
      proto->add_capabilities("thinking");
    }
  }
  const GenerationDefaults& defaults = model.defaults;
  v1::Sampling* sampling = proto->mutable_default_sampling();
  const SamplingParams last_resort;
  sampling->set_temperature(defaults.temperature.value_or(last_resort.temperature));
  sampling->set_top_p(defaults.top_p.value_or(last_resort.top_p));
  if (defaults.top_k) sampling->set_top_k(*defaults.top_k);
  sampling->set_min_p(defaults.min_p.value_or(last_resort.min_p));
  proto->mutable_eos_token_ids()->Add(defaults.eos_token_ids.begin(), defaults.eos_token_ids.end());
}

}  // namespace

void InferenceService::Impl::SetServing(ModelPtr model, EngineCore* core) {
  core_ = core;
  absl::MutexLock lock(&mutex_);
  model_ = std::move(model);
}

std::vector<std::unique_ptr<OutputProcessor>> InferenceService::Impl::MakeOutputs(int num_threads) {
  LATENTD_CHECK(num_threads >= 1);
  std::vector<std::unique_ptr<OutputProcessor>> outputs;
  for (int i = 0; i < num_threads; ++i) {
    outputs.push_back(std::make_unique<OutputProcessor>(
        [this](RequestId id) { core_.load()->Cancel(id); }, observer_));
  }
  return outputs;
}

void InferenceService::Impl::HandleEvents(std::vector<SequenceEvent> events) {
  std::vector<std::vector<SequenceEvent>> shares(outputs_.size());
  for (SequenceEvent& event : events) {
    shares[event.id % shares.size()].push_back(std::move(event));
  }
  for (size_t i = 0; i < shares.size(); ++i) outputs_[i]->HandleEvents(std::move(shares[i]));
}

int32_t InferenceService::Impl::num_active() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int32_t>(calls_.size());
}

void InferenceService::Impl::AbortAll(const absl::Status& status) {
  std::vector<std::shared_ptr<GenerationCall>> calls;
  {
    absl::MutexLock lock(&mutex_);
    for (const auto& [pointer, call] : calls_) calls.push_back(call);
    for (const auto& [id, call] : local_calls_) calls.push_back(call);
  }
  for (const auto& call : calls) call->Abort(status);
}

void InferenceService::Impl::CancelRequest(RequestId id) {
  core_.load()->Cancel(id);
  OutputOf(id).Remove(id);
}

void InferenceService::Impl::OnCallDone(GenerationCall* call) {
  std::shared_ptr<GenerationCall> last;  // destroyed without the lock
  absl::MutexLock lock(&mutex_);
  last = std::move(calls_.extract(call).mapped());
}

absl::StatusOr<InferenceService::Impl::ModelPtr> InferenceService::Impl::Serving() const {
  if (draining_) {
    return MakeError(absl::StatusCode::kUnavailable, "DRAINING",
                     "the server is shutting down and takes no new calls");
  }
  absl::MutexLock lock(&mutex_);
  if (model_ != nullptr) return model_;
  return WithRetryDelay(
      MakeError(absl::StatusCode::kUnavailable, "LOADING", "the model is being loaded"),
      absl::Seconds(5));
}

void InferenceService::Impl::TakeCall(std::shared_ptr<GenerationCall> call, BuildFunction build) {
  bool full = false;
  {
    absl::MutexLock lock(&mutex_);
    calls_.emplace(call.get(), call);
    full = calls_.size() > static_cast<size_t>(options_.max_concurrent_requests);
  }
  if (full) {
    call->Refuse(Overloaded("requests are open", options_.max_concurrent_requests));
  } else {
    PrepareOn(&workers_, std::move(call), std::move(build));
  }
}

int32_t InferenceService::Impl::capacity() const {
  return Serving().ok() ? core_.load()->max_running() : 0;
}

void InferenceService::Impl::Start(CallId id, LocalRequest request,
                                   const LocalCaller::Options& options, Done done) {
  Done finish = [this, id, done = std::move(done)](absl::StatusOr<LocalResponse> response) {
    std::shared_ptr<GenerationCall> call;  // who ends it holds it too
    {
      absl::MutexLock lock(&mutex_);
      call = std::move(local_calls_.extract(id).mapped());
    }
    done(std::move(response));
  };
  std::shared_ptr<GenerationCall> call;
  if (std::holds_alternative<v1::ChatRequest>(request)) {
    call = std::make_shared<LocalCall<v1::ChatResponse>>(this, std::move(finish));
  } else {
    call = std::make_shared<LocalCall<v1::CompleteResponse>>(this, std::move(finish));
  }
  {
    absl::MutexLock lock(&mutex_);
    LATENTD_CHECK(local_calls_.emplace(id, call).second);
  }
  PrepareOn(&local_workers_, std::move(call),
            [this, request = std::make_shared<const LocalRequest>(std::move(request)),
             options](const ServedModel& model) { return BuildLocal(*request, options, model); });
}

void InferenceService::Impl::Cancel(CallId id) {
  std::shared_ptr<GenerationCall> call;
  {
    absl::MutexLock lock(&mutex_);
    const auto it = local_calls_.find(id);
    if (it == local_calls_.end()) return;
    call = it->second;
  }
  call->Abort(MakeError(absl::StatusCode::kCancelled, "CANCELLED", "the call was cancelled"));
}

absl::StatusOr<GenerationRequest> InferenceService::Impl::BuildLocal(
    const LocalRequest& request, const LocalCaller::Options& options,
    const ServedModel& model) const {
  ASSIGN_OR_RETURN(GenerationRequest built,
                   std::visit([&](const auto& proto) { return BuildFrom(proto, model); }, request));
  const bool has_seed =
      std::visit([](const auto& proto) { return proto.sampling().has_seed(); }, request);
  if (!has_seed) built.core.sampling.seed = options.seed;
  built.core.background = true;
  built.core.priority = options.priority;
  built.queue_timeout = absl::InfiniteDuration();
  return built;
}

void InferenceService::Impl::PrepareOn(WorkerPool* workers, std::shared_ptr<GenerationCall> call,
                                       BuildFunction build) {
  if (!workers->TryRun([this, call, build = std::move(build)] { Prepare(call, build); })) {
    call->Refuse(Overloaded("calls wait to be prepared", options_.max_queued_calls));
  }
}

void InferenceService::Impl::Prepare(const std::shared_ptr<GenerationCall>& call,
                                     const BuildFunction& build) {
  if (call->ended()) return;  // cancelled while it waited for this thread
  const auto model = Serving();
  if (!model.ok()) return call->Refuse(model.status());
  auto request = build(**model);
  if (!request.ok()) return call->Refuse(request.status());
  call->Begin(*request, (*model)->name);
  if (absl::Status status = Submit(call, *std::move(request)); !status.ok()) {
    call->Refuse(ExplainSubmit(status));
  }
}

absl::Status InferenceService::Impl::Submit(const std::shared_ptr<GenerationCall>& call,
                                            GenerationRequest request) {
  if (call->ended()) return absl::OkStatus();
  const RequestId id = ++last_id_;
  request.core.id = id;
  OutputOf(id).Add(id, std::move(request.answer), call, call->arrival(),
                   call->arrival() + request.queue_timeout, !request.core.background);
  call->Submitting(id);
  if (absl::Status status = core_.load()->Submit(std::move(request.core)); !status.ok()) {
    OutputOf(id).Remove(id);
    return status;
  }
  call->Submitted(id);
  return absl::OkStatus();
}

template <typename Request, typename Response>
grpc::ServerUnaryReactor* InferenceService::Impl::Answer(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response,
    std::function<absl::Status(const Request&, const ServedModel&, Response*)> answer) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  // gRPC keeps request, response and reactor until Finish.
  const auto run = [this, request, response, reactor, answer = std::move(answer)] {
    const absl::Status status = [&]() -> absl::Status {
      ASSIGN_OR_RETURN(const ModelPtr model, Serving());
      ASSIGN_OR_RETURN(const Request proto, Parse<Request>(*request));
      Response result;
      RETURN_IF_ERROR(answer(proto, *model, &result));
      *response = Encode(result);
      return absl::OkStatus();
    }();
    reactor->Finish(ToGrpcStatus(status));
  };
  if (!workers_.TryRun(run)) {
    reactor->Finish(
        ToGrpcStatus(Overloaded("calls wait to be prepared", options_.max_queued_calls)));
  }
  return reactor;
}

grpc::ServerUnaryReactor* InferenceService::Impl::RenderChat(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request,
                                                             grpc::ByteBuffer* response) {
  return Answer<v1::RenderChatRequest, v1::RenderChatResponse>(
      context, request, response,
      [this](const v1::RenderChatRequest& proto, const ServedModel& model,
             v1::RenderChatResponse* result) -> absl::Status {
        ASSIGN_OR_RETURN(RenderedChat rendered,
                         latentd::RenderChat(proto, model, options_.allow_request_chat_template));
        result->set_text(std::move(rendered.text));
        result->mutable_token_ids()->Add(rendered.tokens.begin(), rendered.tokens.end());
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* InferenceService::Impl::Tokenize(grpc::CallbackServerContext* context,
                                                           const grpc::ByteBuffer* request,
                                                           grpc::ByteBuffer* response) {
  return Answer<v1::TokenizeRequest, v1::TokenizeResponse>(
      context, request, response,
      [](const v1::TokenizeRequest& proto, const ServedModel& model,
         v1::TokenizeResponse* result) -> absl::Status {
        ASSIGN_OR_RETURN(const std::vector<TokenId> ids, TokenizeText(proto, model));
        result->mutable_token_ids()->Add(ids.begin(), ids.end());
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* InferenceService::Impl::Detokenize(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request,
                                                             grpc::ByteBuffer* response) {
  return Answer<v1::DetokenizeRequest, v1::DetokenizeResponse>(
      context, request, response,
      [](const v1::DetokenizeRequest& proto, const ServedModel& model,
         v1::DetokenizeResponse* result) -> absl::Status {
        ASSIGN_OR_RETURN(*result->mutable_text(), DetokenizeIds(proto, model));
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* InferenceService::Impl::GetModel(grpc::CallbackServerContext* context,
                                                           const grpc::ByteBuffer* request,
                                                           grpc::ByteBuffer* response) {
  return Answer<v1::GetModelRequest, v1::GetModelResponse>(
      context, request, response,
      [](const v1::GetModelRequest& proto, const ServedModel& model,
         v1::GetModelResponse* result) -> absl::Status {
        RETURN_IF_ERROR(CheckModelName(proto.model(), model));
        FillModel(model, result->mutable_model());
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* InferenceService::Impl::ListModels(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request,
                                                             grpc::ByteBuffer* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const auto proto = Parse<v1::ListModelsRequest>(*request);
  v1::ListModelsResponse result;
  if (proto.ok()) {
    absl::MutexLock lock(&mutex_);
    if (model_ != nullptr) FillModel(*model_, result.add_models());
  }
  *response = Encode(result);
  reactor->Finish(ToGrpcStatus(proto.status()));
  return reactor;
}

// ---- InferenceService --------------------------------------------------------------------------

InferenceService::InferenceService(const ServiceOptions& options, RequestObserver* observer)
    : impl_(std::make_unique<Impl>(options, observer)) {}
InferenceService::~InferenceService() = default;
grpc::Service* InferenceService::grpc_service() { return impl_.get(); }
void InferenceService::SetServing(std::shared_ptr<const ServedModel> model, EngineCore* core) {
  impl_->SetServing(std::move(model), core);
}
void InferenceService::HandleEvents(std::vector<SequenceEvent> events) {
  impl_->HandleEvents(std::move(events));
}
void InferenceService::StartDrain() { impl_->StartDrain(); }
LocalCaller* InferenceService::local_caller() { return impl_.get(); }
int32_t InferenceService::num_active() const { return impl_->num_active(); }
void InferenceService::AbortAll(const absl::Status& status) { impl_->AbortAll(status); }

}  // namespace latentd
