#include "server/client/bench_report.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace latentd {
namespace {

using nlohmann::json;

json ToJson(const Summary& summary) {
  if (summary.count == 0) return {{"count", 0}};
  return {{"count", summary.count}, {"mean", summary.mean}, {"min", summary.min},
          {"p50", summary.p50},     {"p90", summary.p90},   {"p99", summary.p99},
          {"max", summary.max}};
}

// null where there is nothing to divide by: JSON knows no NaN.
json Ratio(double numerator, double denominator) {
  return denominator > 0 ? json(numerator / denominator) : json(nullptr);
}

json ConfigToJson(const BenchOptions& options) {
  json config = {
      {"target", options.connection.target},
      {"model", options.model},
      {"concurrency", options.concurrency},
      {"request_rate", options.request_rate},
      {"arrivals", options.arrivals},
      {"num_requests", options.num_requests},
      {"duration", options.duration_s},
      {"warmup", options.warmup},
      {"timeout", options.timeout_s},
      {"seed", options.seed},
      {"prompt_tokens", options.prompt_tokens},
      {"output_tokens", options.output_tokens},
      {"prefix_share", options.prefix_share},
      {"prompts", options.prompts},
      {"temperature", options.temperature ? json(*options.temperature) : json(nullptr)},
      {"cache_salt", options.cache_salt},
      {"unary", options.unary},
      {"token_ids", options.token_ids},
      {"connections", options.connections},
      {"threads", options.threads},
      {"max_error_rate", options.max_error_rate},
  };
  if (!options.prompts.empty()) config.erase("prompt_tokens");
  return config;
}

}  // namespace

json MakeReport(const BenchOptions& options, const v1::Model& model, const std::string& started_at,
                bool interrupted, LoadResult* result) {
  const auto per_second = [&](double number) {
    return result->duration_s > 0 ? number / result->duration_s : 0.0;
  };
  const auto num_failed = result->num_failed();
  const double cpu_s = result->user_cpu_s + result->system_cpu_s;
  json errors = json::object();
  for (const auto& [code, error] : result->errors) {
    errors[code] = {{"count", error.count}, {"message", error.message}};
  }
  const bool counted = options.token_ids && !options.unary;
  const auto num_deltas = static_cast<double>(result->num_deltas);
  return {
      {"schema_version", 1},
      {"started_at", started_at},
      {"config", ConfigToJson(options)},
      {"model",
       {{"name", model.name()},
        {"architecture", model.architecture()},
        {"vocab_size", model.vocab_size()},
        {"max_model_len", model.max_model_len()},
        {"weights_hash", model.weights_hash()}}},
      {"duration_s", result->duration_s},
      {"interrupted", interrupted},
      {"requests",
       {{"sent", result->num_sent},
        {"completed", result->num_completed},
        {"failed", num_failed},
        {"cancelled", result->num_cancelled},
        {"short", result->num_short},
        {"max_in_flight", result->max_in_flight},
        {"error_rate", result->num_sent > 0
                           ? static_cast<double>(num_failed) / static_cast<double>(result->num_sent)
                           : 0.0}}},
      {"errors", errors},
      {"tokens",
       {{"prompt", result->prompt_tokens},
        {"cached", result->cached_tokens},
        {"completion", result->completion_tokens},
        {"reasoning", result->reasoning_tokens}}},
      {"throughput",
       {{"requests_per_s", per_second(static_cast<double>(result->num_completed))},
        {"prompt_tokens_per_s", per_second(static_cast<double>(result->prompt_tokens))},
        {"completion_tokens_per_s", per_second(static_cast<double>(result->completion_tokens))}}},
      {"latency_ms",
       {{"ttft", ToJson(Summarize(&result->ttft_ms))},
        {"itl", ToJson(Summarize(&result->itl_ms))},
        {"tpot", ToJson(Summarize(&result->tpot_ms))},
        {"e2e", ToJson(Summarize(&result->e2e_ms))},
        {"send_lag", ToJson(Summarize(&result->send_lag_ms))}}},
      {"deltas",
       {{"count", result->num_deltas},
        {"tokens_per_delta",
         counted ? Ratio(static_cast<double>(result->num_counted_tokens), num_deltas) : json()},
        {"single_token_share",
         counted ? Ratio(static_cast<double>(result->num_single_token_deltas), num_deltas)
                 : json()}}},
      {"client",
       {{"cpu_s", cpu_s},
        {"user_cpu_s", result->user_cpu_s},
        {"system_cpu_s", result->system_cpu_s},
        {"deltas_per_cpu_s", num_deltas > 0 ? Ratio(num_deltas, cpu_s) : json()}}},
  };
}

std::string FormatReport(const json& report) {
  const json& requests = report["requests"];
  const json& tokens = report["tokens"];
  const json& throughput = report["throughput"];
  std::string text = absl::StrFormat(
      "%d requests in %.2f s: %d completed, %d failed, %d cancelled, %d short; at most %d at "
      "once\n",
      requests["sent"].get<int64_t>(), report["duration_s"].get<double>(),
      requests["completed"].get<int64_t>(), requests["failed"].get<int64_t>(),
      requests["cancelled"].get<int64_t>(), requests["short"].get<int64_t>(),
      requests["max_in_flight"].get<int64_t>());
  for (const auto& [code, error] : report["errors"].items()) {
    absl::StrAppendFormat(&text, "  %6d x %s\n", error["count"].get<int64_t>(),
                          error["message"].get<std::string>());
  }
  absl::StrAppendFormat(
      &text,
      "%.1f requests/s, %.1f prompt tokens/s, %.1f completion tokens/s "
      "(%d prompt, %d cached, %d completion)\n",
      throughput["requests_per_s"].get<double>(), throughput["prompt_tokens_per_s"].get<double>(),
      throughput["completion_tokens_per_s"].get<double>(), tokens["prompt"].get<int64_t>(),
      tokens["cached"].get<int64_t>(), tokens["completion"].get<int64_t>());
  absl::StrAppendFormat(&text, "%-10s %10s %10s %10s %10s %10s %10s\n", "ms", "count", "mean",
                        "p50", "p90", "p99", "max");
  for (const char* name : {"ttft", "itl", "tpot", "e2e", "send_lag"}) {
    const json& summary = report["latency_ms"][name];
    if (summary["count"] == 0) continue;
    absl::StrAppendFormat(&text, "%-10s %10d %10.2f %10.2f %10.2f %10.2f %10.2f\n", name,
                          summary["count"].get<int64_t>(), summary["mean"].get<double>(),
                          summary["p50"].get<double>(), summary["p90"].get<double>(),
                          summary["p99"].get<double>(), summary["max"].get<double>());
  }
  const json& deltas = report["deltas"];
  const json& client = report["client"];
  if (!deltas["single_token_share"].is_null()) {
    absl::StrAppendFormat(&text, "%d deltas, %.2f tokens each, %.1f %% with exactly one\n",
                          deltas["count"].get<int64_t>(), deltas["tokens_per_delta"].get<double>(),
                          100 * deltas["single_token_share"].get<double>());
  }
  absl::StrAppendFormat(&text, "client CPU %.2f s", client["cpu_s"].get<double>());
  if (!client["deltas_per_cpu_s"].is_null()) {
    absl::StrAppendFormat(&text, ", %.0f deltas per CPU second",
                          client["deltas_per_cpu_s"].get<double>());
  }
  return text + "\n";
}

}  // namespace latentd
