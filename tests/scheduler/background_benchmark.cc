// What an endless backlog of background requests costs the others: time to first token (TTFT) and
// between tokens (ITL) with it and without, and how much of the engine's token budget is used.
//
//   build/tests/scheduler/background_benchmark [seconds [load]]        default: 240 0.7
//
// Two cores run side by side over engines whose step takes 20 ms for up to 256 tokens, and get the
// same requests at the same moments: Poisson arrivals, prompts of 32 to 480 tokens, answers of 16
// to 112, so many that they take `load` of the token budget. One of them also has a backlog of
// background requests of the same lengths: 32 more than there are seats, each replaced as it ends.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/status.h"
#include "scheduler/engine_core.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {
namespace {

constexpr absl::Duration kStep = absl::Milliseconds(20);
constexpr int32_t kBudget = 256;  // tokens of a step
constexpr int32_t kSeats = 128;
constexpr int kBacklog = kSeats + 32;
constexpr int kMinPrompt = 32, kMaxPrompt = 480;
constexpr int kMinAnswer = 16, kMaxAnswer = 112;
constexpr absl::Duration kWarmup = absl::Seconds(10);
constexpr RequestId kFirstBackground = RequestId{1} << 32;

FakeEngineOptions EngineOptions() {
  FakeEngineOptions options;
  options.info.num_blocks = 2048;
  options.info.max_step_tokens = kBudget;
  options.info.max_sequences = kSeats;
  options.zero_compute = true;
  options.step_delay = kStep;
  return options;
}

Request RandomRequest(RequestId id, std::mt19937_64& random) {
  const auto pick = [&random](int low, int high) {
    return std::uniform_int_distribution<int>(low, high)(random);
  };
  Request request;
  request.id = id;
  request.prompt.resize(pick(kMinPrompt, kMaxPrompt));
  for (TokenId& token : request.prompt) token = pick(0, 999);
  request.max_new_tokens = pick(kMinAnswer, kMaxAnswer);
  return request;
}

// Milliseconds.
struct Latencies {
  std::vector<double> first, between;

  static double Quantile(std::vector<double>* values, double q) {
    if (values->empty()) return 0;
    const auto nth = values->begin() + static_cast<int64_t>(q * (values->size() - 1));
    std::nth_element(values->begin(), nth, values->end());
    return *nth;
  }
};

// A core, its engine, and the clients' watches.
class Arm {
 public:
  explicit Arm(bool has_backlog) : engine_(EngineOptions()), has_backlog_(has_backlog) {
    core_ = std::make_unique<EngineCore>(
        SchedulerConfig{.max_step_tokens = kBudget, .max_running = kSeats}, &engine_,
        EngineCore::Callbacks{
            .on_events = [this](std::vector<SequenceEvent> events) { OnEvents(events); },
            .on_step = [this](const StepReport& report) { OnStep(report); }});
  }
  ~Arm() { core_->Stop(); }

  // Once, before all else.
  void Begin() {
    for (int i = 0; has_backlog_ && i < kBacklog; ++i) SubmitBackground();
  }

  void Submit(const Request& request) {
    {
      absl::MutexLock lock(&mutex_);
      clients_[request.id] = {.arrival = absl::Now(), .last = absl::InfinitePast()};
    }
    LATENTD_CHECK(core_->Submit(request).ok());
  }

  // From now on it counts.
  void BeginMeasuring() {
    absl::MutexLock lock(&mutex_);
    begin_ = absl::Now();
    latencies_ = {};
    num_tokens_ = num_background_tokens_ = 0;
  }

  struct Result {
    Latencies latencies;
    double used = 0;        // share of the token budget
    double background = 0;  // of that, for background requests
    int64_t num_preemptions = 0;
  };
  Result End() {
    const int64_t num_preemptions = core_->stats().num_preemptions;
    absl::MutexLock lock(&mutex_);
    const double budget = absl::FDivDuration(absl::Now() - begin_, kStep) * kBudget;
    return {.latencies = std::move(latencies_),
            .used = static_cast<double>(num_tokens_) / budget,
            .background = static_cast<double>(num_background_tokens_) / budget,
            .num_preemptions = num_preemptions};
  }

 private:
  struct Client {
    absl::Time arrival, last;
  };

  void SubmitBackground() {
    Request request = RandomRequest(kFirstBackground + num_background_++, random_);
    request.background = true;
    const absl::Status status = core_->Submit(std::move(request));
    LATENTD_CHECK(status.ok() || absl::IsUnavailable(status));  // the end
  }

  void OnEvents(const std::vector<SequenceEvent>& events) {
    const absl::Time now = absl::Now();
    int num_ended = 0;
    {
      absl::MutexLock lock(&mutex_);
      for (const SequenceEvent& event : events) {
        if (event.id >= kFirstBackground) {
          num_ended += event.finish != FinishReason::kNone;
        } else if (event.kind == SequenceEvent::Kind::kToken) {
          Client& client = clients_[event.id];
          const bool first = client.last == absl::InfinitePast();
          (first ? latencies_.first : latencies_.between)
              .push_back(absl::ToDoubleMilliseconds(now - (first ? client.arrival : client.last)));
          client.last = now;
          if (event.finish != FinishReason::kNone) clients_.erase(event.id);
        }
      }
    }
    for (; num_ended > 0; --num_ended) SubmitBackground();
  }

  void OnStep(const StepReport& report) {
    absl::MutexLock lock(&mutex_);
    num_tokens_ += report.num_tokens;
    num_background_tokens_ += report.num_background_tokens;
  }

  FakeEngine engine_;
  const bool has_backlog_;
  std::mt19937_64 random_{7};  // of the backlog: the main thread's, then the core's
  RequestId num_background_ = 0;

  absl::Mutex mutex_;
  absl::Time begin_ ABSL_GUARDED_BY(mutex_);
  absl::flat_hash_map<RequestId, Client> clients_ ABSL_GUARDED_BY(mutex_);
  Latencies latencies_ ABSL_GUARDED_BY(mutex_);
  int64_t num_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t num_background_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  std::unique_ptr<EngineCore> core_;
};

void Print(const char* name, double without, double with) {
  std::printf("%-10s %10.1f %10.1f %8.3f\n", name, without, with, with / without);
}

void Run(absl::Duration duration, double load) {
  Arm without(false), with(true);
  with.Begin();
  // The last token of an answer is drawn, but never computed.
  const double tokens = (kMinPrompt + kMaxPrompt) / 2.0 + (kMinAnswer + kMaxAnswer) / 2.0 - 1;
  const double rate = load * kBudget / absl::ToDoubleSeconds(kStep) / tokens;
  std::mt19937_64 random(1);
  std::exponential_distribution<double> gap(rate);
  const absl::Time start = absl::Now();
  absl::Time next = start;
  bool measuring = false;
  RequestId id = 0;
  for (; next < start + kWarmup + duration; next += absl::Seconds(gap(random))) {
    absl::SleepFor(next - absl::Now());
    if (!measuring && next >= start + kWarmup) {
      without.BeginMeasuring();
      with.BeginMeasuring();
      measuring = true;
    }
    const Request request = RandomRequest(++id, random);
    without.Submit(request);
    with.Submit(request);
  }
  Arm::Result a = without.End(), b = with.End();
  std::printf("%s, load %.2f: %zu requests, %.1f a second; %lld preemptions\n\n",
              absl::FormatDuration(duration).c_str(), load, a.latencies.first.size(), rate,
              static_cast<long long>(b.num_preemptions));
  std::printf("%-10s %10s %10s %8s\n", "ms", "without", "with", "ratio");
  for (const double q : {0.5, 0.99}) {
    Print(absl::StrCat("TTFT p", q * 100).c_str(), Latencies::Quantile(&a.latencies.first, q),
          Latencies::Quantile(&b.latencies.first, q));
  }
  for (const double q : {0.5, 0.99}) {
    Print(absl::StrCat("ITL p", q * 100).c_str(), Latencies::Quantile(&a.latencies.between, q),
          Latencies::Quantile(&b.latencies.between, q));
  }
  std::printf("budget used %8.1f%% %9.1f%%, %.1f%% of it for the backlog\n", 100 * a.used,
              100 * b.used, 100 * b.background);
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 240;
  const double load = argc > 2 ? std::atof(argv[2]) : 0.7;
  latentd::Run(absl::Seconds(seconds), load);
}
