#ifndef LATENTD_TESTS_SERVER_CLIENT_SCRIPTED_SERVER_H_
#define LATENTD_TESTS_SERVER_CLIENT_SCRIPTED_SERVER_H_

#include <google/protobuf/message.h>
#include <grpcpp/grpcpp.h>

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "latentd/v1/inference.grpc.pb.h"

namespace latentd {

// A server that does what a test tells it: each RPC runs the function of its name, on a thread of
// its own, and is UNIMPLEMENTED without one. Set the functions before the first call.
class ScriptedServer final : public v1::InferenceService::Service {
 public:
  using Writer = grpc::ServerWriter<v1::GenerationEvent>;
  template <typename Request, typename Response>
  using Unary = std::function<grpc::Status(grpc::ServerContext&, const Request&, Response*)>;
  template <typename Request>
  using Stream = std::function<grpc::Status(grpc::ServerContext&, const Request&, Writer&)>;

  // Listens on a free port, or on `port`.
  explicit ScriptedServer(int port = 0);
  ~ScriptedServer() override;

  std::string target() const { return "127.0.0.1:" + std::to_string(port_); }

  // What came in so far.
  std::vector<v1::ChatRequest> chats();
  std::vector<v1::CompleteRequest> completions();
  std::atomic<int> num_cancelled = 0;  // streams that ended with the client gone

  v1::Model model;                             // of GetModel: 1,000 token ids, 4,096 tokens
  std::function<grpc::Status()> on_get_model;  // before the model is given; may refuse
  Stream<v1::ChatRequest> on_stream_chat;
  Stream<v1::CompleteRequest> on_stream_complete;
  Unary<v1::ChatRequest, v1::ChatResponse> on_chat;
  Unary<v1::CompleteRequest, v1::CompleteResponse> on_complete;

 private:
  grpc::Status GetModel(grpc::ServerContext*, const v1::GetModelRequest*,
                        v1::GetModelResponse*) override;
  grpc::Status Chat(grpc::ServerContext*, const v1::ChatRequest*, v1::ChatResponse*) override;
  grpc::Status Complete(grpc::ServerContext*, const v1::CompleteRequest*,
                        v1::CompleteResponse*) override;
  grpc::Status StreamChat(grpc::ServerContext*, const v1::ChatRequest*, Writer*) override;
  grpc::Status StreamComplete(grpc::ServerContext*, const v1::CompleteRequest*, Writer*) override;

  std::mutex mutex_;
  std::vector<v1::ChatRequest> chats_;
  std::vector<v1::CompleteRequest> completions_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

// The events of a stream.
v1::GenerationEvent StartedEvent();
v1::GenerationEvent ContentEvent(const std::string& text, int num_token_ids = 1);
v1::GenerationEvent ReasoningEvent(const std::string& text, int num_token_ids = 1);
v1::GenerationEvent FinishedEvent(v1::FinishReason reason = v1::FINISH_REASON_STOP);
v1::GenerationEvent UsageEvent(int prompt_tokens, int cached_tokens, int completion_tokens,
                               int reasoning_tokens = 0);

// A status with google.rpc details, as the server sends them.
grpc::Status StatusWithDetails(grpc::StatusCode code, const std::string& message,
                               const std::vector<const google::protobuf::Message*>& details);
// UNAVAILABLE with RetryInfo: "the model is loading".
grpc::Status LoadingStatus(int retry_delay_ms);

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_CLIENT_SCRIPTED_SERVER_H_
