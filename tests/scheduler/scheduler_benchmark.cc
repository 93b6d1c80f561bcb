// What the scheduler costs on the host: build/tests/scheduler/scheduler_benchmark
#include <benchmark/benchmark.h>
#include <time.h>

#include <atomic>
#include <chrono>
#include <random>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "engine/status.h"
#include "scheduler/engine_core.h"
#include "scheduler/scheduler.h"
#include "tests/scheduler/fake_engine.h"

namespace latentd {
namespace {

constexpr int kVocabSize = 129280;

EngineInfo BigEngine() {
  return {.num_blocks = 40'000,
          .num_dp_ranks = 1,
          .max_step_tokens = 1 << 21,
          .max_sequences = 4096,
          .max_model_len = 65536,
          .vocab_size = kVocabSize};
}

Request MakeRequest(RequestId id, int num_tokens, int max_new_tokens) {
  std::mt19937_64 random(id);
  Request request;
  request.id = id;
  request.prompt.resize(num_tokens);
  for (TokenId& token : request.prompt) token = static_cast<TokenId>(random() % kVocabSize);
  request.max_new_tokens = max_new_tokens;
  return request;
}

// The tokens of a step, as an engine would give them.
StepResult Answer(const StepPlan& plan) {
  StepResult result;
  for (const SequenceStep& step : plan.sequences) {
    if (step.sample) result.sampled.push_back(static_cast<TokenId>((plan.step + step.id) % 1000));
  }
  return result;
}

absl::Duration ProcessCpu() {
  timespec time;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return absl::DurationFromTimespec(time);
}

double Seconds(std::chrono::steady_clock::duration duration) {
  return std::chrono::duration<double>(duration).count();
}

// Schedule + Update of a step in which state.range(0) sequences, state.range(1) tokens long, decode
// one token each; hashing the blocks that fill up included.
void BM_DecodeStep(benchmark::State& state) {
  const int num_sequences = static_cast<int>(state.range(0));
  const int length = static_cast<int>(state.range(1));
  Scheduler scheduler({.max_step_tokens = 1 << 21, .max_running = 4096, .max_waiting = 4096},
                      BigEngine());
  for (int i = 0; i < num_sequences; ++i) {
    // Of different lengths, so that some sequences fill a block in each step.
    LATENTD_CHECK(scheduler.Add(MakeRequest(i, length - 32 + i % 64, 1 << 15)).ok());
  }
  StepPlan plan = scheduler.Schedule();
  LATENTD_CHECK(scheduler.Update(plan, Answer(plan)).ok());
  std::chrono::steady_clock::duration schedule{}, update{};
  for (auto _ : state) {
    const auto start = std::chrono::steady_clock::now();
    plan = scheduler.Schedule();
    const auto scheduled = std::chrono::steady_clock::now();
    const StepResult result = Answer(plan);
    const auto executed = std::chrono::steady_clock::now();
    auto events = scheduler.Update(plan, result);
    benchmark::DoNotOptimize(events);
    const auto updated = std::chrono::steady_clock::now();
    schedule += scheduled - start;
    update += updated - executed;
    state.SetIterationTime(Seconds(scheduled - start + updated - executed));
  }
  LATENTD_CHECK(scheduler.num_running() == num_sequences);
  const auto per_step = benchmark::Counter::kAvgIterations;
  state.counters["schedule_us"] = benchmark::Counter(Seconds(schedule) * 1e6, per_step);
  state.counters["update_us"] = benchmark::Counter(Seconds(update) * 1e6, per_step);
  state.counters["plan_kb"] = static_cast<double>(plan.blocks.size() * sizeof(BlockId) +
                                                  plan.sequences.size() * sizeof(SequenceStep)) /
                              1e3;
}
BENCHMARK(BM_DecodeStep)
    ->Args({1, 4000})
    ->Args({256, 4000})
    ->Args({2048, 500})
    ->UseManualTime()
    ->Iterations(500)
    ->Unit(benchmark::kMicrosecond);

// A prompt of state.range(0) tokens that nobody has asked: Add, its one step, its end.
void BM_NewPrompt(benchmark::State& state) {
  Scheduler scheduler({.max_step_tokens = 1 << 21}, BigEngine());
  RequestId id = 0;
  for (auto _ : state) {
    state.PauseTiming();
    Request request = MakeRequest(id++, static_cast<int>(state.range(0)), 1);
    state.ResumeTiming();
    LATENTD_CHECK(scheduler.Add(std::move(request)).ok());
    const StepPlan plan = scheduler.Schedule();
    LATENTD_CHECK(scheduler.Update(plan, Answer(plan)).ok());
  }
}
BENCHMARK(BM_NewPrompt)->Arg(4000)->Arg(60000)->Unit(benchmark::kMicrosecond);

// The same prompt over and over: all but its last block comes from the cache.
void BM_CachedPrompt(benchmark::State& state) {
  Scheduler scheduler({.max_step_tokens = 1 << 21}, BigEngine());
  const Request prompt = MakeRequest(0, static_cast<int>(state.range(0)), 1);
  RequestId id = 0;
  for (auto _ : state) {
    Request request = prompt;
    request.id = id++;
    LATENTD_CHECK(scheduler.Add(std::move(request)).ok());
    const StepPlan plan = scheduler.Schedule();
    LATENTD_CHECK(scheduler.Update(plan, Answer(plan)).ok());
  }
}
BENCHMARK(BM_CachedPrompt)->Arg(4000)->Arg(60000)->Unit(benchmark::kMicrosecond);

// All of EngineCore and the zero-compute engine, in CPU time of the process, per token:
// state.range(0) requests at once, 100 tokens each, from Submit to the last event.
void BM_CoreToken(benchmark::State& state) {
  FakeEngine engine({.info = BigEngine(), .zero_compute = true});
  const int num_requests = static_cast<int>(state.range(0));
  constexpr int kTokensEach = 100;
  std::atomic<int64_t> num_finished = 0;
  EngineCore core({.max_running = 4096, .max_waiting = 4096}, &engine,
                  {.on_events = [&](std::vector<SequenceEvent> events) {
                    for (const SequenceEvent& event : events) {
                      num_finished += event.finish != FinishReason::kNone;
                    }
                  }});
  RequestId id = 0;
  for (auto _ : state) {
    std::vector<Request> requests;
    for (int i = 0; i < num_requests; ++i) requests.push_back(MakeRequest(++id, 200, kTokensEach));
    num_finished = 0;
    const absl::Duration start = ProcessCpu();
    for (Request& request : requests) LATENTD_CHECK(core.Submit(std::move(request)).ok());
    while (num_finished < num_requests) absl::SleepFor(absl::Milliseconds(1));
    state.SetIterationTime(absl::ToDoubleSeconds(ProcessCpu() - start) /
                           (num_requests * kTokensEach));
  }
}
BENCHMARK(BM_CoreToken)->Arg(1)->Arg(256)->Arg(2048)->UseManualTime()->Iterations(10);

void BM_HashBlock(benchmark::State& state) {
  const std::vector<TokenId> tokens(kBlockSize, 1);
  BlockHash hash = HashSalt("");
  for (auto _ : state) hash = HashBlock(hash, tokens);
  benchmark::DoNotOptimize(hash);
}
BENCHMARK(BM_HashBlock);

}  // namespace
}  // namespace latentd

BENCHMARK_MAIN();
