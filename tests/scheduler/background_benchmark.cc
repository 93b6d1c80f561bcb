// What an endless backlog of background requests costs the clients: time to first token (TTFT) and
// between tokens (ITL) with it and without, and how much of the engine's token budget is used.
//
//   build/tests/scheduler/background_benchmark
//
// Four hours of Poisson arrivals each, on paper (background_load.h says how), at 70 % load; the
// backlog is a quarter more than there are seats.
#include <algorithm>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "tests/scheduler/background_load.h"

namespace latentd {
namespace {

void Print(const char* what, const BackgroundLoadResult& result,
           const BackgroundLoadResult& without) {
  std::printf("%-28s", what);
  const auto print = [](const std::vector<double>& values, const std::vector<double>& base) {
    for (const double q : {0.5, 0.99}) {
      const double value = BackgroundLoadResult::Quantile(values, q);
      std::printf(" %8.1f (%5.3f)", value, value / BackgroundLoadResult::Quantile(base, q));
    }
  };
  print(result.ttft_ms, without.ttft_ms);
  print(result.itl_ms, without.itl_ms);
  std::printf(" %6.1f%% %9.0f %8lld\n", 100 * result.used, result.tokens_per_second,
              static_cast<long long>(result.num_preemptions));
}

void Compare(const std::string& title, BackgroundLoad load, int32_t cap) {
  load.duration = absl::Hours(4);
  const BackgroundLoadResult without = RunBackgroundLoad(load);
  load.backlog = load.seats + load.seats / 4;
  const BackgroundLoadResult with = RunBackgroundLoad(load);
  std::printf("%s: %zu requests\n%-28s %16s %16s %16s %16s %7s %9s %8s\n", title.c_str(),
              without.ttft_ms.size(), "ms (ratio)", "TTFT p50", "TTFT p99", "ITL p50", "ITL p99",
              "used", "tokens/s", "preempt.");
  Print("without a backlog", without, without);
  Print("with one", with, without);
  if (cap > 0) {
    load.max_background_tokens = cap;
    Print("with one, capped", RunBackgroundLoad(load), without);
  }
  std::printf("\n");
}

}  // namespace
}  // namespace latentd

int main() {
  latentd::Compare("a step takes 20 ms for up to 256 tokens", {}, 0);
  // Few seats: they are taken from the backlog.
  latentd::Compare("the same with 64 seats", {.seats = 64}, 0);
  // As a GPU: reading the weights hides the work on the first 512 tokens.
  latentd::BackgroundLoad growing;
  growing.step_tokens = 8192;
  growing.seats = 256;
  growing.step_time = [](int32_t num_tokens) {
    return absl::Milliseconds(20) + std::max(num_tokens - 512, 0) * absl::Microseconds(40);
  };
  growing.load = 0.5;
  growing.tokens_per_second = 1 / 40e-6;
  growing.max_prompt = 4000;
  latentd::Compare("a step takes 20 ms for 512 tokens and 40 us for each further one of 8192",
                   growing, 512);
}
