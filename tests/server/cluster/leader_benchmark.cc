// What a step costs the leader: its process' own CPU time for Schedule, the ranks' shares, sending,
// receiving and Update. The ranks are stubs in another process, so that theirs is not counted; they
// answer at once, so that wall time is the overhead of a step.
//
//   leader_benchmark                 all sizes
//   leader_benchmark --benchmark_filter=Step/16/2048
//
// Counters, microseconds a step: cpu_us, all threads of the leader; core_us, of that the thread
// that calls Execute(); schedule_us and update_us, of that the scheduler. plan_bytes: sent a step.

#include <benchmark/benchmark.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "engine/group_member.h"
#include "engine/plan_split.h"
#include "engine/status.h"
#include "scheduler/scheduler.h"
#include "server/cluster/cluster_leader.h"
#include "server/cluster/plan_codec.h"
#include "server/cluster/rank_session.h"
#include "server/cluster/remote_engine.h"
#include "spdlog/spdlog.h"

extern char** environ;

namespace latentd {
namespace {

constexpr int32_t kVocabSize = 129280;

EngineInfo RankInfo(int32_t num_ranks) {
  return {.num_blocks = 1 << 17,
          .num_dp_ranks = num_ranks,
          .max_step_tokens = 8192,
          .max_sequences = 2048,
          .max_model_len = 65536,
          .vocab_size = kVocabSize};
}

// Draws the same token over and over.
class StubMember final : public GroupMember {
 public:
  explicit StubMember(int32_t num_ranks) : num_ranks_(num_ranks) {}
  EngineInfo info() const override { return RankInfo(num_ranks_); }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    StepResult result;
    for (const SequenceStep& sequence : plan.sequences) {
      if (sequence.sample) result.sampled.push_back(7);
    }
    return result;
  }
  absl::Status Join(const GroupSpec&, absl::Time) override { return absl::OkStatus(); }
  void AbortGroup(const absl::Status&) override {}
  std::string waiting_in() const override { return ""; }
  std::string address() const override { return ":1"; }

 private:
  const int32_t num_ranks_;
};

int RunStubs(int port, int32_t num_ranks) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  std::vector<std::thread> threads;
  for (int32_t rank = 0; rank < num_ranks; ++rank) {
    threads.emplace_back([port, rank, num_ranks] {
      RankSessionOptions options;
      options.leader = absl::StrCat("127.0.0.1:", port);
      options.rank = rank;
      RankSession session(
          options,
          [num_ranks](int32_t, LoadListener*) -> absl::StatusOr<std::unique_ptr<GroupMember>> {
            return std::make_unique<StubMember>(num_ranks);
          });
      (void)session.Run();
    });
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

// A leader, and the process of its stub ranks.
class Setup {
 public:
  explicit Setup(int32_t num_ranks) {
    ClusterOptions options;
    options.world_size = num_ranks;
    auto leader = ClusterLeader::Start(options);
    LATENTD_CHECK(leader.ok());
    leader_ = *std::move(leader);
    std::vector<std::string> words = {"leader_benchmark", "--stubs", absl::StrCat(leader_->port()),
                                      absl::StrCat(num_ranks)};
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    LATENTD_CHECK(
        posix_spawn(&pid_, "/proc/self/exe", nullptr, nullptr, arguments.data(), environ) == 0);
    const absl::StatusOr<bool> formed = leader_->AwaitGroup(absl::Seconds(60));
    LATENTD_CHECK(formed.ok() && *formed);
    engine_ = std::make_unique<RemoteEngine>(leader_.get());
  }
  ~Setup() {
    engine_.reset();
    leader_.reset();
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  RemoteEngine* engine() { return engine_.get(); }

 private:
  std::unique_ptr<ClusterLeader> leader_;
  std::unique_ptr<RemoteEngine> engine_;
  pid_t pid_ = 0;
};

double CpuMicros(clockid_t clock) {
  timespec time;
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) * 1e6 + static_cast<double>(time.tv_nsec) * 1e-3;
}

// One step of the core thread, by what it is spent on.
struct Spent {
  double schedule = 0, update = 0;
  StepPlan plan;
};

void RunStep(Scheduler* scheduler, Engine* engine, Spent* spent) {
  const double begin = CpuMicros(CLOCK_THREAD_CPUTIME_ID);
  spent->plan = scheduler->Schedule();
  const double scheduled = CpuMicros(CLOCK_THREAD_CPUTIME_ID);
  const absl::StatusOr<StepResult> result = engine->Execute(spent->plan);
  LATENTD_CHECK(result.ok());
  const double executed = CpuMicros(CLOCK_THREAD_CPUTIME_ID);
  LATENTD_CHECK(scheduler->Update(spent->plan, *result).ok());
  spent->schedule += scheduled - begin;
  spent->update += CpuMicros(CLOCK_THREAD_CPUTIME_ID) - executed;
}

void Step(benchmark::State& state) {
  const auto num_ranks = static_cast<int32_t>(state.range(0));
  const auto num_sequences = static_cast<int32_t>(state.range(1));
  const auto context = static_cast<int32_t>(state.range(2));
  Setup setup(num_ranks);
  Scheduler scheduler({.max_step_tokens = 8192, .max_running = 2048, .max_waiting = 4096},
                      setup.engine()->info());
  for (int32_t i = 0; i < num_sequences; ++i) {
    Request request;
    request.id = i;
    request.prompt.assign(context, i % kVocabSize);
    request.max_new_tokens = 60000;
    LATENTD_CHECK(scheduler.Add(std::move(request)).ok());
  }
  Spent spent;
  while (scheduler.num_not_started() > 0 ||
         static_cast<int32_t>(spent.plan.tokens.size()) != num_sequences) {
    RunStep(&scheduler, setup.engine(), &spent);
  }
  spent.schedule = spent.update = 0;
  const double process = CpuMicros(CLOCK_PROCESS_CPUTIME_ID);
  const double core = CpuMicros(CLOCK_THREAD_CPUTIME_ID);
  for (auto _ : state) RunStep(&scheduler, setup.engine(), &spent);
  const auto steps = static_cast<double>(state.iterations());
  state.counters["cpu_us"] = (CpuMicros(CLOCK_PROCESS_CPUTIME_ID) - process) / steps;
  state.counters["core_us"] = (CpuMicros(CLOCK_THREAD_CPUTIME_ID) - core) / steps;
  state.counters["schedule_us"] = spent.schedule / steps;
  state.counters["update_us"] = spent.update / steps;
  state.counters["plan_bytes"] = static_cast<double>(EncodedPlanSize(spent.plan));
}
BENCHMARK(Step)
    ->ArgNames({"ranks", "sequences", "context"})
    ->ArgsProduct({{1, 4, 16}, {64, 512, 2048}, {1000}})
    ->Args({16, 2048, 4000})
    ->UseRealTime()
    ->Unit(benchmark::kMicrosecond);

// What of that is the shares and their bytes.
void SplitAndEncode(benchmark::State& state) {
  const int32_t num_ranks = 16;
  Scheduler scheduler({.max_step_tokens = 8192, .max_running = 2048, .max_waiting = 4096},
                      RankInfo(num_ranks));
  for (int32_t i = 0; i < 2048; ++i) {
    Request request;
    request.id = i;
    request.prompt.assign(state.range(0), i);
    request.max_new_tokens = 60000;
    LATENTD_CHECK(scheduler.Add(std::move(request)).ok());
  }
  StepPlan plan;
  while (plan.tokens.size() != 2048) {
    plan = scheduler.Schedule();
    StepResult result;
    for (const SequenceStep& sequence : plan.sequences) {
      if (sequence.sample) result.sampled.push_back(7);
    }
    LATENTD_CHECK(scheduler.Update(plan, result).ok());
  }
  std::vector<StepPlan> shares;
  for (auto _ : state) {
    SplitPlan(plan, num_ranks, &shares);
    for (const StepPlan& share : shares) {
      benchmark::DoNotOptimize(EncodeStepMessage(1, share));
    }
  }
}
BENCHMARK(SplitAndEncode)->Arg(1000)->Arg(4000)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);  // as the daemon
  spdlog::set_level(spdlog::level::err);
  if (argc == 4 && std::strcmp(argv[1], "--stubs") == 0) {
    return latentd::RunStubs(std::atoi(argv[2]), std::atoi(argv[3]));
  }
  benchmark::Initialize(&argc, argv);
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
