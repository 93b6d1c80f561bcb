#include "server/client/bench_options.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int64_t kMaxTokens = 1 << 24;  // above any model's length
constexpr int64_t kDefaultConcurrency = 16;
constexpr int64_t kDefaultNumRequests = 100;
constexpr int64_t kStreamsPerConnection = 256;

template <typename T>
absl::Status CheckRange(absl::string_view option, T value, T low, T high) {
  if (value >= low && value <= high) return absl::OkStatus();  // also refuses NaN
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is ", value, "; it must lie in [", low, ", ", high, "]"));
}

absl::Status BadCount(absl::string_view option, absl::string_view text, absl::string_view why) {
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is '", text, "': ", why,
                   "; known forms: N, MIN:MAX, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA"));
}

}  // namespace

absl::StatusOr<TokenCount> TokenCount::Parse(absl::string_view option, absl::string_view text) {
  TokenCount count;
  absl::string_view numbers = text;
  char separator = ':';
  if (absl::ConsumePrefix(&numbers, "normal:")) {
    count.kind_ = Kind::kNormal;
    separator = ',';
  } else if (absl::ConsumePrefix(&numbers, "lognormal:")) {
    count.kind_ = Kind::kLogNormal;
    separator = ',';
  }
  const std::vector<absl::string_view> parts = absl::StrSplit(numbers, separator);
  if (count.kind_ == Kind::kUniform) {
    int64_t low = 0, high = 0;
    if (parts.size() > 2 || !absl::SimpleAtoi(parts.front(), &low) ||
        !absl::SimpleAtoi(parts.back(), &high)) {
      return BadCount(option, text, "not a number or a range");
    }
    if (low > high) return BadCount(option, text, "the range is empty");
    if (low < 1 || high > kMaxTokens) {
      return BadCount(option, text, absl::StrCat("must lie in [1, ", kMaxTokens, "]"));
    }
    count.min_ = low;
    count.max_ = high;
    return count;
  }
  if (parts.size() != 2 || !absl::SimpleAtod(parts[0], &count.location_) ||
      !absl::SimpleAtod(parts[1], &count.scale_)) {
    return BadCount(option, text, "needs two numbers");
  }
  if (!(count.location_ >= 1 && count.location_ <= kMaxTokens)) {
    return BadCount(option, text,
                    absl::StrCat("the first number must lie in [1, ", kMaxTokens, "]"));
  }
  if (!(count.scale_ >= 0 && count.scale_ <= kMaxTokens)) {
    return BadCount(option, text, absl::StrCat("the second must lie in [0, ", kMaxTokens, "]"));
  }
  return count;
}

int64_t TokenCount::Sample(Random& random, int64_t max) const {
  double value = 0;
  switch (kind_) {
    case Kind::kUniform:
      value = static_cast<double>(min_ + static_cast<int64_t>(random.Below(*max_ - min_ + 1)));
      break;
    case Kind::kNormal:
      value = location_ + scale_ * random.Normal();
      break;
    case Kind::kLogNormal:
      value = location_ * std::exp(scale_ * random.Normal());
      break;
  }
  // As doubles: a lognormal draw may be beyond every integer.
  return static_cast<int64_t>(std::clamp(std::round(value), static_cast<double>(min_),
                                         static_cast<double>(std::max(min_, max))));
}

void AddBenchOptions(CLI::App& app, BenchOptions* options) {
  AddConnectionOptions(app, &options->connection);
  app.add_option("--model", options->model, "Model name (default: the one that is served)");
  auto* concurrency = app.add_option(
      "--concurrency", options->concurrency,
      "Closed loop: this many requests under way (default 16 without --request-rate)");
  app.add_option("--request-rate", options->request_rate,
                 "Open loop: requests a second, sent whatever the server does")
      ->excludes(concurrency);
  app.add_option("--arrivals", options->arrivals, "Of --request-rate: poisson, constant")
      ->capture_default_str();
  app.add_option("--num-requests", options->num_requests,
                 "Requests in all (default 100 without --duration)");
  app.add_option("--duration", options->duration_s, "Seconds to send for; the rest then ends");
  app.add_option("--warmup", options->warmup, "Requests before the measurement")
      ->capture_default_str();
  app.add_option("--timeout", options->timeout_s, "Deadline of a request, seconds")
      ->capture_default_str();
  app.add_option("--seed", options->seed, "Of prompts, lengths and arrivals")
      ->capture_default_str();
  app.add_option("--prompt-tokens", options->prompt_tokens,
                 "Random token ids: N, MIN:MAX, normal:MEAN,DEVIATION, lognormal:MEDIAN,SIGMA")
      ->capture_default_str();
  app.add_option("--output-tokens", options->output_tokens,
                 "Exact lengths of the answers, end tokens ignored; the same forms (default 128; "
                 "with --prompts: as the requests say)");
  app.add_option("--prefix-share", options->prefix_share,
                 "Part of each prompt that all prompts begin with, 0 to 1")
      ->capture_default_str();
  app.add_option("--prompts", options->prompts,
                 "Chats instead of random tokens: a file with a user message or a ChatRequest "
                 "(JSON) a line");
  app.add_option("--temperature", options->temperature, "Default: the model's");
  app.add_option("--cache-salt", options->cache_salt,
                 "Prefix cache to share (default: this run's own)");
  auto* unary = app.add_flag("--unary", options->unary, "Whole answers in one message");
  app.add_flag_callback(
         "--stream", [options] { options->unary = false; }, "Streamed answers (default)")
      ->excludes(unary);
  app.add_flag("--token-ids,!--no-token-ids", options->token_ids,
               "Ask for token ids, to count the tokens of each delta (default: yes)");
  app.add_option("--connections", options->connections,
                 "TCP connections (default: one for every 256 requests under way)");
  app.add_option("--threads", options->threads, "Client threads")->capture_default_str();
  app.add_option("--max-error-rate", options->max_error_rate,
                 "Share of failed requests that fails the run, 0 to 1")
      ->capture_default_str();
  app.add_option("--output", options->output, "File of the JSON report (default: standard output)");
  app.add_flag("--quiet", options->quiet, "No progress and no table on standard error");
}

absl::Status FinishBenchOptions(BenchOptions* options) {
  RETURN_IF_ERROR(ValidateConnectionOptions(options->connection));
  if (options->concurrency != 0 && options->request_rate != 0) {
    return absl::InvalidArgumentError("--concurrency and --request-rate exclude one another");
  }
  if (options->concurrency == 0 && options->request_rate == 0) {
    options->concurrency = kDefaultConcurrency;
  }
  if (options->request_rate != 0) {
    RETURN_IF_ERROR(CheckRange("--request-rate", options->request_rate, 1e-3, 1e6));
  } else {
    RETURN_IF_ERROR(CheckRange<int64_t>("--concurrency", options->concurrency, 1, 65536));
  }
  if (options->arrivals != "poisson" && options->arrivals != "constant") {
    return absl::InvalidArgumentError(
        absl::StrCat("--arrivals is '", options->arrivals, "'; known are: poisson, constant"));
  }
  if (options->num_requests == 0 && options->duration_s == 0) {
    options->num_requests = kDefaultNumRequests;
  }
  RETURN_IF_ERROR(CheckRange<int64_t>("--num-requests", options->num_requests, 0, 1'000'000'000));
  RETURN_IF_ERROR(CheckRange("--duration", options->duration_s, 0.0, 86400.0));
  RETURN_IF_ERROR(CheckRange<int64_t>("--warmup", options->warmup, 0, 1'000'000));
  RETURN_IF_ERROR(CheckRange("--timeout", options->timeout_s, 1e-3, 86400.0));
  RETURN_IF_ERROR(CheckRange("--prefix-share", options->prefix_share, 0.0, 1.0));
  RETURN_IF_ERROR(CheckRange("--max-error-rate", options->max_error_rate, 0.0, 1.0));
  RETURN_IF_ERROR(CheckRange<int64_t>("--threads", options->threads, 1, 64));
  if (options->connections == 0) {
    options->connections =
        std::max(options->threads,
                 (options->concurrency + kStreamsPerConnection - 1) / kStreamsPerConnection);
  }
  RETURN_IF_ERROR(
      CheckRange<int64_t>("--connections", options->connections, options->threads, 1024));
  if (!options->prompts.empty() && options->prefix_share != 0) {
    return absl::InvalidArgumentError("--prefix-share is of random prompts; --prompts excludes it");
  }
  if (options->prompts.empty() && options->output_tokens.empty()) options->output_tokens = "128";
  RETURN_IF_ERROR(TokenCount::Parse("--prompt-tokens", options->prompt_tokens).status());
  if (!options->output_tokens.empty()) {
    RETURN_IF_ERROR(TokenCount::Parse("--output-tokens", options->output_tokens).status());
  }
  return absl::OkStatus();
}

}  // namespace latentd
