#include "tests/scheduler/background_load.h"

#include <algorithm>
#include <random>

#include "absl/container/flat_hash_map.h"
#include "engine/status.h"
#include "scheduler/scheduler.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {
namespace {

constexpr RequestId kFirstBackground = RequestId{1} << 32;

class Run {
 public:
  explicit Run(const BackgroundLoad& load)
      : load_(load),
        engine_(EngineOptions(load)),
        scheduler_({.max_step_tokens = load.step_tokens,
                    .max_running = load.seats,
                    .max_waiting = 1 << 20,
                    .max_background_tokens = load.max_background_tokens},
                   engine_.info()) {}

  BackgroundLoadResult Execute() {
    // The last token of an answer is drawn, but never computed.
    const double tokens = (load_.min_prompt + load_.max_prompt) / 2.0 +
                          (load_.min_answer + load_.max_answer) / 2.0 - 1;
    const double rate = load_.load * load_.tokens_per_second / tokens;
    std::exponential_distribution<double> gap(rate);
    const absl::Time warm = now_ + load_.duration / 10, end = warm + load_.duration;
    absl::Time next = now_;
    for (int i = 0; i < load_.backlog; ++i) AddBackground();
    while (now_ < end) {
      for (; next <= now_; next += absl::Seconds(gap(clients_))) AddClient(next);
      measuring_ = now_ >= warm;
      if (!Step()) Pass(next - now_);
    }
    BackgroundLoadResult& result = result_;
    std::sort(result.ttft_ms.begin(), result.ttft_ms.end());
    std::sort(result.itl_ms.begin(), result.itl_ms.end());
    result.used = static_cast<double>(num_tokens_) / budget_;
    result.background = static_cast<double>(num_background_tokens_) / budget_;
    result.num_preemptions = scheduler_.num_preemptions();
    result.tokens_per_second =
        static_cast<double>(num_tokens_) / absl::ToDoubleSeconds(load_.duration);
    return std::move(result_);
  }

 private:
  struct Client {
    absl::Time arrival, last = absl::InfinitePast();
  };

  static FakeEngineOptions EngineOptions(const BackgroundLoad& load) {
    FakeEngineOptions options;
    options.info.num_blocks = 1 << 14;
    options.info.max_step_tokens = load.step_tokens;
    options.info.max_sequences = load.seats;
    options.zero_compute = true;
    return options;
  }

  void Add(RequestId id, bool background, std::mt19937_64* random) {
    const auto pick = [random](int low, int high) {
      return std::uniform_int_distribution<int>(low, high)(*random);
    };
    Request request;
    request.id = id;
    request.background = background;
    request.prompt.resize(pick(load_.min_prompt, load_.max_prompt));
    for (TokenId& token : request.prompt) token = pick(0, 999);
    request.max_new_tokens = pick(load_.min_answer, load_.max_answer);
    LATENTD_CHECK(scheduler_.Add(std::move(request)).ok());
  }
  void AddBackground() { Add(kFirstBackground + num_background_++, true, &backlog_); }
  void AddClient(absl::Time arrival) {
    Add(++num_clients_, false, &clients_);
    open_[num_clients_] = {.arrival = arrival};
  }

  // False when there is nothing to do.
  bool Step() {
    const StepPlan plan = scheduler_.Schedule();
    if (plan.empty()) return false;
    const int32_t num_tokens = static_cast<int32_t>(plan.tokens.size());
    const absl::StatusOr<StepResult> result = engine_.Execute(plan);
    LATENTD_CHECK(result.ok());
    const auto events = scheduler_.Update(plan, *result);
    LATENTD_CHECK(events.ok());
    if (measuring_) {
      num_tokens_ += num_tokens;
      num_background_tokens_ += scheduler_.num_background_tokens();
      budget_ += load_.step_tokens;
    }
    now_ += load_.step_time(num_tokens);
    for (const SequenceEvent& event : *events) Take(event);
    return true;
  }

  // Idle; steps could have run.
  void Pass(absl::Duration duration) {
    now_ += duration;
    if (measuring_) {
      budget_ += absl::FDivDuration(duration, load_.step_time(1)) * load_.step_tokens;
    }
  }

  void Take(const SequenceEvent& event) {
    const bool ended = event.finish != FinishReason::kNone;
    if (event.id >= kFirstBackground) {
      if (ended) AddBackground();
      return;
    }
    Client& client = open_[event.id];
    const bool first = client.last == absl::InfinitePast();
    if (measuring_) {
      (first ? result_.ttft_ms : result_.itl_ms)
          .push_back(absl::ToDoubleMilliseconds(now_ - (first ? client.arrival : client.last)));
    }
    client.last = now_;
    if (ended) open_.erase(event.id);
  }

  const BackgroundLoad load_;
  FakeEngine engine_;
  Scheduler scheduler_;
  std::mt19937_64 clients_{1}, backlog_{2};  // the clients are the same whatever the backlog
  absl::Time now_ = absl::UnixEpoch();
  bool measuring_ = false;
  RequestId num_clients_ = 0, num_background_ = 0;
  absl::flat_hash_map<RequestId, Client> open_;
  int64_t num_tokens_ = 0, num_background_tokens_ = 0;
  double budget_ = 0;
  BackgroundLoadResult result_;
};

}  // namespace

BackgroundLoadResult RunBackgroundLoad(const BackgroundLoad& load) { return Run(load).Execute(); }

}  // namespace latentd
