#ifndef LATENTD_SERVER_BENCH_ENGINE_BENCH_H_
#define LATENTD_SERVER_BENCH_ENGINE_BENCH_H_

#include <cstdint>
#include <filesystem>
#include <iosfwd>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "server/engine_factory.h"

namespace latentd {

// A number of things and their length, both >= 1: "8:2048".
struct CountAndLength {
  int32_t count = 0;
  int32_t length = 0;
};
// INVALID_ARGUMENT names `option` and the text.
absl::StatusOr<CountAndLength> ParseCountAndLength(const std::string& option,
                                                   const std::string& text);

struct EngineBenchOptions {
  std::vector<CountAndLength> decode = {};   // sequences : context, at the middle of the run
  std::vector<CountAndLength> prefill = {};  // prompts : tokens of each
  int32_t steps = 64;                        // measured, of each decode scenario; >= 1
  int32_t warmup_steps = 8;                  // before those; >= 0
  int32_t repeats = 3;                       // of each prefill scenario; >= 1
  // Each block of a context is computed as if a sequence began with it: the cache is as full, and
  // the attention of long prompts is spared.
  bool synthetic_context = false;
  bool profile = true;  // where the time of a step goes, where the engine can tell
};

// The scenarios of the performance table in README.md.
EngineBenchOptions TableScenarios();

// Runs the engine alone: no gRPC, no scheduler, one step after the other. Writes one JSON object a
// line to `out`: first {"name": "start"}, then each scenario; progress and the memory plan go to
// `err`. Prompts are random tokens, drawing is greedy.
//
// Every line: name; tok_s; steps. decode: batch, context, ms_per_step {median, p10, p90}, the time
// from one step's end to the next's. prefill: prompts, tokens, ms (of all, the median of the
// repeats), max_step_tokens. With the CUDA engine besides: roofline_ms and percent_of_roofline (see
// roofline.h: H100, datasheet), reached_ms (the rates of the best kernels), gpu_idle_ms (median,
// between two steps), gpu_busy_ms (median), and families: where the time goes.
absl::Status RunEngineBench(const ModelConfig& model, const std::filesystem::path& dir,
                            LoadFormat format, const EngineSettings& settings,
                            const EngineBenchOptions& options, std::ostream& out,
                            std::ostream& err);

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_ENGINE_BENCH_H_
