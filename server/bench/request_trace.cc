#include "server/bench/request_trace.h"

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/client/random.h"

namespace latentd {
namespace {

// Streams of Random: lengths and tokens apart, so that one moves nothing of the other.
constexpr uint64_t kTokenStream = 0x544f4b454e000000;

RequestTrace::Lengths Draw(const TokenCount& prompt, const TokenCount& output, uint64_t seed,
                           int64_t index, int32_t max_model_len) {
  Random random(seed, index);
  RequestTrace::Lengths lengths;
  const int64_t longest_output = max_model_len - prompt.max().value_or(prompt.min());
  lengths.output = static_cast<int32_t>(output.Sample(random, longest_output));
  lengths.prompt = static_cast<int32_t>(prompt.Sample(random, max_model_len - lengths.output));
  return lengths;
}

}  // namespace

absl::StatusOr<RequestTrace> RequestTrace::Make(const TraceOptions& options,
                                                const EngineInfo& engine) {
  RequestTrace trace;
  ASSIGN_OR_RETURN(trace.prompt_, TokenCount::Parse("--prompt-tokens", options.prompt_tokens));
  ASSIGN_OR_RETURN(trace.output_, TokenCount::Parse("--output-tokens", options.output_tokens));
  // What an unbounded distribution draws is cut to what is left; fixed lengths have to fit.
  const int64_t longest = trace.prompt_.max().value_or(trace.prompt_.min()) +
                          trace.output_.max().value_or(trace.output_.min());
  if (longest > engine.max_model_len) {
    return absl::InvalidArgumentError(
        absl::StrCat("--prompt-tokens ", options.prompt_tokens, " and --output-tokens ",
                     options.output_tokens, " need up to ", longest,
                     " tokens; a rank's cache or the model takes ", engine.max_model_len));
  }
  trace.seed_ = options.seed;
  trace.max_model_len_ = engine.max_model_len;
  trace.vocab_size_ = engine.vocab_size;
  return trace;
}

RequestTrace::Lengths RequestTrace::LengthsOf(int64_t index) const {
  return Draw(prompt_, output_, seed_, index, max_model_len_);
}

Request RequestTrace::At(int64_t index) const {
  const Lengths lengths = LengthsOf(index);
  Random random(seed_, kTokenStream + index);
  Request request;
  request.id = index + 1;
  request.prompt.resize(lengths.prompt);
  for (TokenId& token : request.prompt) token = static_cast<TokenId>(random.Below(vocab_size_));
  request.max_new_tokens = lengths.output;
  return request;
}

}  // namespace latentd
