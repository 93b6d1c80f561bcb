#ifndef LATENTD_TESTS_SCHEDULER_BACKGROUND_LOAD_H_
#define LATENTD_TESTS_SCHEDULER_BACKGROUND_LOAD_H_

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/time/time.h"

namespace latentd {

// Clients' requests, with or without an endless backlog of background ones beside them, through the
// real scheduler and an engine that exists on paper: time passes as its steps take it, so hours
// pass in seconds, and the same load gives the same figures anywhere.
struct BackgroundLoad {
  absl::Duration duration = absl::Hours(1);  // measured; after the tenth part of it to warm up
  double load = 0.7;                         // share of the token budget that the clients take
  int32_t step_tokens = 256;                 // the budget of a step
  int32_t seats = 128;
  // How long a step of so many tokens takes.
  std::function<absl::Duration(int32_t num_tokens)> step_time = [](int32_t) {
    return absl::Milliseconds(20);
  };
  // The load is a share of so many tokens a second.
  double tokens_per_second = 256 / 0.02;
  // Prompts and answers of the clients and of the backlog, uniformly drawn.
  int min_prompt = 32, max_prompt = 480;
  int min_answer = 16, max_answer = 112;
  int backlog = 0;  // background requests at any time, each replaced when it ends
  int32_t max_background_tokens = 0;
};

struct BackgroundLoadResult {
  std::vector<double> ttft_ms, itl_ms;  // of the clients, sorted
  double used = 0;                      // share of the budget of the steps that ran or could have
  double background = 0;                // of that, by the backlog
  int64_t num_preemptions = 0;
  double tokens_per_second = 0;  // of both

  static double Quantile(const std::vector<double>& sorted, double q) {
    return sorted.empty() ? 0 : sorted[static_cast<size_t>(q * (sorted.size() - 1))];
  }
};

BackgroundLoadResult RunBackgroundLoad(const BackgroundLoad& load);

}  // namespace latentd

#endif  // LATENTD_TESTS_SCHEDULER_BACKGROUND_LOAD_H_
