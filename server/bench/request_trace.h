#ifndef LATENTD_SERVER_BENCH_REQUEST_TRACE_H_
#define LATENTD_SERVER_BENCH_REQUEST_TRACE_H_

#include <cstdint>
#include <string>

#include "absl/status/statusor.h"
#include "engine/engine.h"
#include "scheduler/request.h"
#include "server/client/bench_options.h"

namespace latentd {

struct TraceOptions {
  // TokenCount. The means are those of ShareGPT in the vLLM paper (arXiv 2309.06180, figure 11),
  // 161 and 338; form and spread are assumed.
  std::string prompt_tokens = "lognormal:76,1.23";
  std::string output_tokens = "lognormal:230,0.88";
  uint64_t seed = 0;
};

// The requests of a simulation: request i is a function of the options and i alone, whatever the
// load. Prompts are random tokens, so none is a prefix of another.
class RequestTrace {
 public:
  // INVALID_ARGUMENT names the option that cannot be read, or lengths that `engine` cannot hold.
  static absl::StatusOr<RequestTrace> Make(const TraceOptions& options, const EngineInfo& engine);

  struct Lengths {
    int32_t prompt = 0, output = 0;  // >= 1; together at most max_model_len
  };
  Lengths LengthsOf(int64_t index) const;
  Request At(int64_t index) const;  // its id is index + 1

 private:
  RequestTrace() = default;

  TokenCount prompt_, output_;
  uint64_t seed_ = 0;
  int32_t max_model_len_ = 0;
  int32_t vocab_size_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_REQUEST_TRACE_H_
