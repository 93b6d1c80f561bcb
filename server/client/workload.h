#ifndef LATENTD_SERVER_CLIENT_WORKLOAD_H_
#define LATENTD_SERVER_CLIENT_WORKLOAD_H_

#include <grpcpp/support/byte_buffer.h>

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "latentd/v1/inference.pb.h"
#include "server/client/bench_options.h"

namespace latentd {

// The requests of a benchmark. Request i is a function of the options, the model and i alone: which
// thread sends it, and when, changes nothing. Immutable; any thread may call At().
class Workload {
 public:
  struct Item {
    grpc::ByteBuffer request;   // serialised
    int64_t prompt_tokens = 0;  // 0: the server's template decides
    int64_t output_tokens = 0;  // exact length asked for; 0: the request leaves it open
  };

  // Reads the file of --prompts, and refuses lengths that the model cannot hold. The options are
  // finished ones.
  static absl::StatusOr<Workload> Make(const BenchOptions& options, const v1::Model& model);

  // Full gRPC method name: "/latentd.v1.InferenceService/StreamComplete".
  const std::string& method() const { return method_; }

  // `index` may be any number; warm-up uses negative ones.
  Item At(int64_t index) const;

 private:
  Workload() = default;
  absl::Status CheckLengths() const;
  absl::Status ReadPrompts(const std::string& path);
  Item RandomPrompt(int64_t index) const;
  Item Chat(int64_t index) const;

  BenchOptions options_;
  std::string method_;
  int64_t vocab_size_ = 0;
  int64_t max_model_len_ = 0;
  TokenCount prompt_tokens_;
  std::optional<TokenCount> output_tokens_;
  std::vector<int32_t> prefix_;         // [max_model_len] ids that prompts share the beginning of
  std::vector<v1::ChatRequest> chats_;  // of --prompts
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_WORKLOAD_H_
