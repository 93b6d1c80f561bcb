#include "tests/engine/cpu/group_harness.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <string_view>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/comm/local_communicator.h"
#include "engine/comm/tcp_listener.h"
#include "engine/plan_split.h"
#include "engine/status.h"

namespace latentd {
namespace {

uint64_t HashOf(const float* logits, size_t count) {
  return std::hash<std::string_view>()(
      std::string_view(reinterpret_cast<const char*>(logits), count * sizeof(float)));
}

[[noreturn]] void Die(const absl::Status& status) {
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

// Which of its rank's tokens each token of a plan is.
struct RowOfRank {
  int rank;
  int row;
};
std::vector<RowOfRank> RowsOfRanks(const StepPlan& plan, int num_ranks) {
  std::vector<int> next(num_ranks, 0);
  std::vector<RowOfRank> rows;
  for (const SequenceStep& s : plan.sequences) {
    for (int i = 0; i < s.num_tokens; ++i) rows.push_back({s.dp_rank, next[s.dp_rank]++});
  }
  return rows;
}

std::vector<std::unique_ptr<Communicator>> MakeTcpCommunicators(int num_ranks) {
  std::vector<std::unique_ptr<TcpListener>> listeners;
  std::vector<std::string> addresses;
  for (int rank = 0; rank < num_ranks; ++rank) {
    auto listener = TcpListener::Listen({.call_timeout = absl::Minutes(2)});
    if (!listener.ok()) Die(listener.status());
    addresses.push_back((*listener)->address());
    listeners.push_back(*std::move(listener));
  }
  std::vector<std::unique_ptr<Communicator>> communicators(num_ranks);
  OnEachRank(num_ranks, [&](int rank) {
    auto joined = listeners[rank]->Join(1, rank, addresses, absl::Now() + absl::Minutes(1));
    if (!joined.ok()) Die(joined.status());
    communicators[rank] = *std::move(joined);
  });
  return communicators;
}

}  // namespace

void OnEachRank(int num_ranks, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int rank = 0; rank < num_ranks; ++rank) threads.emplace_back(body, rank);
  for (std::thread& thread : threads) thread.join();
}

GroupRunner::GroupRunner(const LoadedModel& model, int num_ranks, const GroupRunnerOptions& options)
    : runners_(num_ranks),
      communicators_(options.tcp ? MakeTcpCommunicators(num_ranks)
                                 : MakeLocalCommunicators(num_ranks, absl::Minutes(2))),
      exchanges_(num_ranks) {
  OnEachRank(num_ranks, [&](int rank) {
    RunnerOptions of_rank = options.runner;
    of_rank.placement = {.rank = rank, .world_size = num_ranks};
    runners_[rank] = std::make_unique<Runner>(model, of_rank);
    if (num_ranks == 1) return;
    exchanges_[rank] =
        std::make_unique<ExpertExchange>(runners_[rank]->config(), runners_[rank]->pool(),
                                         *communicators_[rank], options.gather_bytes);
  });
  info_ = {.num_blocks = options.runner.num_blocks,
           .num_dp_ranks = num_ranks,
           .max_step_tokens = options.runner.max_step_tokens,
           .max_sequences = options.max_sequences,
           .max_model_len = options.runner.max_positions > 0 ? options.runner.max_positions
                                                             : model.config.max_position_embeddings,
           .vocab_size = model.config.vocab_size};
}

std::vector<std::vector<float>> GroupRunner::RunShares(
    const StepPlan& plan, const std::vector<std::vector<int32_t>>& wanted) {
  const int num_ranks = info_.num_dp_ranks;
  SplitPlan(plan, num_ranks, &shares_);
  std::vector<std::vector<float>> logits(num_ranks);
  OnEachRank(num_ranks, [&](int rank) {
    Forward& forward = runners_[rank]->forward();
    const absl::Status status = forward.Run(shares_[rank], exchanges_[rank].get());
    if (!status.ok()) Die(status);
    logits[rank].resize(wanted[rank].size() * info_.vocab_size);
    if (!wanted[rank].empty()) forward.Logits(wanted[rank], logits[rank].data());
  });
  return logits;
}

std::vector<float> GroupRunner::Step(const StepPlan& plan) {
  const std::vector<RowOfRank> rows = RowsOfRanks(plan, info_.num_dp_ranks);
  std::vector<std::vector<int32_t>> wanted(info_.num_dp_ranks);
  for (const RowOfRank& row : rows) wanted[row.rank].push_back(row.row);
  const std::vector<std::vector<float>> of_ranks = RunShares(plan, wanted);
  std::vector<float> logits;
  for (const RowOfRank& row : rows) {
    const auto begin = of_ranks[row.rank].begin() + int64_t{row.row} * info_.vocab_size;
    logits.insert(logits.end(), begin, begin + info_.vocab_size);
  }
  return logits;
}

absl::StatusOr<StepResult> GroupRunner::Execute(const StepPlan& plan) {
  const std::vector<RowOfRank> rows = RowsOfRanks(plan, info_.num_dp_ranks);
  std::vector<std::vector<int32_t>> wanted(info_.num_dp_ranks);
  int next = 0;
  for (const SequenceStep& s : plan.sequences) {
    next += s.num_tokens;
    if (s.sample) wanted[s.dp_rank].push_back(rows[next - 1].row);
  }
  const std::vector<std::vector<float>> of_ranks = RunShares(plan, wanted);
  std::vector<size_t> taken(info_.num_dp_ranks, 0);
  StepResult result;
  for (const SequenceStep& s : plan.sequences) {
    if (!s.sample) continue;
    const float* logits =
        of_ranks[s.dp_rank].data() + taken[s.dp_rank]++ * size_t(info_.vocab_size);
    result.sampled.push_back(
        static_cast<TokenId>(std::max_element(logits, logits + info_.vocab_size) - logits));
    const int position = s.num_computed_tokens + s.num_tokens;
    const uint64_t print = HashOf(logits, info_.vocab_size);
    const auto [at, is_new] = prints_.try_emplace({s.id, position}, print);
    if (!is_new && at->second != print) {
      return absl::InternalError(
          absl::StrCat("request ", s.id, " at ", position, ": other logits than before"));
    }
  }
  return result;
}

std::vector<LoadItem> RandomLoad(uint64_t seed, int count, int vocab_size, int max_prompt,
                                 int max_new) {
  std::mt19937_64 random(seed);
  const auto pick = [&](int low, int high) {
    return low + static_cast<int>(random() % (high - low + 1));
  };
  std::vector<TokenId> common(max_prompt);
  for (TokenId& token : common) token = pick(0, vocab_size - 1);
  std::vector<LoadItem> load(count);
  int arrival = 0;
  for (int i = 0; i < count; ++i) {
    LoadItem& item = load[i];
    item.request.id = i + 1;
    // Mostly short prompts, so that several run together and grow into blocks that are not there.
    const int length = pick(1, pick(0, 3) == 0 ? max_prompt : std::min(max_prompt, kBlockSize));
    const int shared = pick(0, 1) == 0 ? length : pick(0, length);
    item.request.prompt.assign(common.begin(), common.begin() + shared);
    while (static_cast<int>(item.request.prompt.size()) < length) {
      item.request.prompt.push_back(pick(0, vocab_size - 1));
    }
    item.request.max_new_tokens = pick(1, max_new);
    if (pick(0, 1) == 0) item.request.sampling = {.temperature = 0};
    item.request.sampling.seed = seed + i;
    arrival += pick(0, 4) == 0 ? pick(1, 24) : 0;  // often several at once
    item.arrival = arrival;
    if (pick(0, 5) == 0) item.cancel = arrival + pick(0, max_new);
  }
  return load;
}

LoadReport RunLoad(const std::vector<LoadItem>& load, const SchedulerConfig& config,
                   Engine* engine) {
  Scheduler scheduler(config, engine->info());
  LoadReport report;
  std::set<RequestId> open;
  size_t next = 0;
  for (int step = 0; next < load.size() || !scheduler.idle(); ++step) {
    for (; next < load.size() && load[next].arrival <= step; ++next) {
      if (absl::Status status = scheduler.Add(load[next].request); !status.ok()) Die(status);
      open.insert(load[next].request.id);
    }
    for (const LoadItem& item : load) {
      if (item.cancel == step && open.erase(item.request.id) > 0) {
        scheduler.Cancel(item.request.id);
        ++report.num_cancelled;
      }
    }
    const StepPlan plan = scheduler.Schedule();
    if (plan.empty()) continue;
    std::set<int32_t> ranks;
    bool prompt = false, decode = false;
    for (const SequenceStep& s : plan.sequences) {
      ranks.insert(s.dp_rank);
      (s.num_tokens > 1 ? prompt : decode) = true;
    }
    ++report.num_steps;
    report.num_mixed += prompt && decode;
    report.num_with_idle += static_cast<int32_t>(ranks.size()) < engine->info().num_dp_ranks;
    const absl::StatusOr<StepResult> result = engine->Execute(plan);
    if (!result.ok()) Die(result.status());
    const auto events = scheduler.Update(plan, *result);
    if (!events.ok()) Die(events.status());
    for (const SequenceEvent& event : *events) {
      report.tokens[event.id].push_back(event.token);
      if (event.finish != FinishReason::kNone) open.erase(event.id);
    }
  }
  report.num_preemptions = scheduler.num_preemptions();
  report.num_cached_tokens = scheduler.cached_tokens();
  return report;
}

std::string TokensThatDiffer(const std::vector<LoadItem>& load, const LoadReport& one,
                             const LoadReport& other) {
  for (const LoadItem& item : load) {
    const RequestId id = item.request.id;
    const auto of = [id](const LoadReport& report) {
      const auto at = report.tokens.find(id);
      return at == report.tokens.end() ? std::vector<TokenId>() : at->second;
    };
    std::vector<TokenId> a = of(one), b = of(other);
    if (item.cancel >= 0) {
      const size_t both = std::min(a.size(), b.size());
      a.resize(both);
      b.resize(both);
    } else if (a.size() != static_cast<size_t>(item.request.max_new_tokens)) {
      return absl::StrCat("request ", id, ": ", a.size(), " tokens of ",
                          item.request.max_new_tokens);
    }
    if (a != b) {
      return absl::StrCat("request ", id, ": ", absl::StrJoin(a, " "), " and ",
                          absl::StrJoin(b, " "));
    }
  }
  return "";
}

}  // namespace latentd
