#ifndef LATENTD_SERVER_CLIENT_BENCH_OPTIONS_H_
#define LATENTD_SERVER_CLIENT_BENCH_OPTIONS_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/client/connection.h"
#include "server/client/random.h"

namespace CLI {
class App;
}

namespace latentd {

// How many tokens: a number, or a distribution of numbers.
class TokenCount {
 public:
  // "512", "128:1024" (uniform, both ends included), "normal:512,64" (mean, standard deviation),
  // "lognormal:400,0.8" (median, sigma of the logarithm). `option` is named in errors.
  static absl::StatusOr<TokenCount> Parse(absl::string_view option, absl::string_view text);

  // In [min(), max]; a draw of normal or lognormal beyond it becomes the limit.
  int64_t Sample(Random& random, int64_t max) const;

  int64_t min() const { return min_; }
  // The largest number of a fixed count or a range; none for the unbounded distributions.
  std::optional<int64_t> max() const { return max_; }

 private:
  enum class Kind { kUniform, kNormal, kLogNormal };

  Kind kind_ = Kind::kUniform;
  double location_ = 0, scale_ = 0;  // normal: mean, deviation; lognormal: median, sigma
  int64_t min_ = 1;
  std::optional<int64_t> max_;
};

// Options of `latentd bench serve`, by the names of the flags.
struct BenchOptions {
  ConnectionOptions connection = {};
  std::string model = "";  // empty: the one that is served

  // Closed loop: `concurrency` requests are under way at any time. Open loop: `request_rate` a
  // second, whatever the server does, with latencies from the time when a request was due.
  int64_t concurrency = 0;           // 1..65536; 0: open loop, or the default of 16
  double request_rate = 0;           // (0, 1e6]; 0: closed loop
  std::string arrivals = "poisson";  // or constant
  int64_t num_requests = 0;          // 0: as many as the duration holds; 100 without one
  double duration_s = 0;             // sending stops after it; what is under way ends. 0: no limit
  int64_t warmup = 0;                // requests before, not measured
  double timeout_s = 600;            // deadline of each request
  uint64_t seed = 0;

  std::string prompt_tokens = "256";  // TokenCount
  std::string output_tokens = "";     // TokenCount; empty: 128, and with `prompts` the file's own
  double prefix_share = 0;            // [0, 1]: part of each prompt that all prompts begin with
  std::string prompts = "";           // file of chat messages instead of random tokens
  std::optional<float> temperature = std::nullopt;
  std::string cache_salt = "";  // empty: one of this run, so that no earlier run's cache helps

  bool unary = false;
  bool token_ids = true;      // ask for ids: tells how many tokens each delta carries
  int64_t connections = 0;    // 0: one for every 256 requests under way, at least `threads`
  int64_t threads = 1;        // of the client
  double max_error_rate = 0;  // [0, 1]: more errors than this fail the run
  std::string output = "";    // file of the JSON report; empty: standard output
  bool quiet = false;         // no progress, no table
};

// Adds the flags of BenchOptions to `app`.
void AddBenchOptions(CLI::App& app, BenchOptions* options);

// Fills in defaults that depend on other options, and refuses what makes no sense, by name, value
// and limit.
absl::Status FinishBenchOptions(BenchOptions* options);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BENCH_OPTIONS_H_
