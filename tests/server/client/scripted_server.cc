#include "tests/server/client/scripted_server.h"

#include "engine/status.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace latentd {

ScriptedServer::ScriptedServer(int port) {
  model.set_name("scripted");
  model.set_architecture("deepseek_v3");
  model.set_vocab_size(1000);
  model.set_max_model_len(4096);
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:" + std::to_string(port), grpc::InsecureServerCredentials(),
                           &port_);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  LATENTD_CHECK(server_ != nullptr && port_ > 0);
}

ScriptedServer::~ScriptedServer() { server_->Shutdown(std::chrono::system_clock::now()); }

std::vector<v1::ChatRequest> ScriptedServer::chats() {
  const std::lock_guard lock(mutex_);
  return chats_;
}

std::vector<v1::CompleteRequest> ScriptedServer::completions() {
  const std::lock_guard lock(mutex_);
  return completions_;
}

grpc::Status ScriptedServer::GetModel(grpc::ServerContext*, const v1::GetModelRequest*,
                                      v1::GetModelResponse* response) {
  if (on_get_model) {
    if (grpc::Status status = on_get_model(); !status.ok()) return status;
  }
  *response->mutable_model() = model;
  return grpc::Status::OK;
}

grpc::Status ScriptedServer::Chat(grpc::ServerContext* context, const v1::ChatRequest* request,
                                  v1::ChatResponse* response) {
  if (!on_chat) return {grpc::StatusCode::UNIMPLEMENTED, "not scripted"};
  return on_chat(*context, *request, response);
}

grpc::Status ScriptedServer::Complete(grpc::ServerContext* context,
                                      const v1::CompleteRequest* request,
                                      v1::CompleteResponse* response) {
  if (!on_complete) return {grpc::StatusCode::UNIMPLEMENTED, "not scripted"};
  return on_complete(*context, *request, response);
}

grpc::Status ScriptedServer::StreamChat(grpc::ServerContext* context,
                                        const v1::ChatRequest* request, Writer* writer) {
  {
    const std::lock_guard lock(mutex_);
    chats_.push_back(*request);
  }
  if (!on_stream_chat) return {grpc::StatusCode::UNIMPLEMENTED, "not scripted"};
  const grpc::Status status = on_stream_chat(*context, *request, *writer);
  if (context->IsCancelled()) ++num_cancelled;
  return status;
}

grpc::Status ScriptedServer::StreamComplete(grpc::ServerContext* context,
                                            const v1::CompleteRequest* request, Writer* writer) {
  {
    const std::lock_guard lock(mutex_);
    completions_.push_back(*request);
  }
  if (!on_stream_complete) return {grpc::StatusCode::UNIMPLEMENTED, "not scripted"};
  const grpc::Status status = on_stream_complete(*context, *request, *writer);
  if (context->IsCancelled()) ++num_cancelled;
  return status;
}

v1::GenerationEvent StartedEvent() {
  v1::GenerationEvent event;
  event.mutable_started()->set_request_id("r1");
  event.mutable_started()->set_model("scripted");
  return event;
}

v1::GenerationEvent ContentEvent(const std::string& text, int num_token_ids) {
  v1::GenerationEvent event;
  event.mutable_delta()->set_content(text);
  for (int i = 0; i < num_token_ids; ++i) event.mutable_delta()->add_token_ids(100'000 + i);
  return event;
}

v1::GenerationEvent ReasoningEvent(const std::string& text, int num_token_ids) {
  v1::GenerationEvent event = ContentEvent("", num_token_ids);
  event.mutable_delta()->set_reasoning(text);
  return event;
}

v1::GenerationEvent FinishedEvent(v1::FinishReason reason) {
  v1::GenerationEvent event;
  event.mutable_finished()->set_finish_reason(reason);
  return event;
}

v1::GenerationEvent UsageEvent(int prompt_tokens, int cached_tokens, int completion_tokens,
                               int reasoning_tokens) {
  v1::GenerationEvent event;
  v1::Usage& usage = *event.mutable_usage();
  usage.set_prompt_tokens(prompt_tokens);
  usage.set_cached_tokens(cached_tokens);
  usage.set_completion_tokens(completion_tokens);
  usage.set_reasoning_tokens(reasoning_tokens);
  return event;
}

grpc::Status StatusWithDetails(grpc::StatusCode code, const std::string& message,
                               const std::vector<const google::protobuf::Message*>& details) {
  google::rpc::Status status;
  status.set_code(code);
  status.set_message(message);
  for (const google::protobuf::Message* detail : details) status.add_details()->PackFrom(*detail);
  return {code, message, status.SerializeAsString()};
}

grpc::Status LoadingStatus(int retry_delay_ms) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(retry_delay_ms / 1000);
  retry.mutable_retry_delay()->set_nanos(retry_delay_ms % 1000 * 1'000'000);
  return StatusWithDetails(grpc::StatusCode::UNAVAILABLE, "the model is loading", {&retry});
}

}  // namespace latentd
