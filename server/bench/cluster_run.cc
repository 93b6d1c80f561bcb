#include "server/bench/cluster_run.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "engine/status.h"
#include "scheduler/scheduler.h"
#include "server/bench/simulated_engine.h"
#include "server/client/random.h"

namespace latentd {
namespace {

class Run {
 public:
  Run(const ClusterModel& model, const RequestTrace& trace, const ClusterLoad& load, uint64_t seed,
      const ClusterRunOptions& options)
      : model_(model),
        trace_(trace),
        load_(load),
        options_(options),
        engine_(model),
        scheduler_({.max_step_tokens = model.info().max_step_tokens,
                    .max_running = model.info().max_sequences,
                    .max_waiting = std::max(options.max_waiting, load.concurrency)},
                   engine_.info()) {
    if (load.request_rate > 0) {
      arrivals_.emplace(Arrivals::Process::kPoisson, load.request_rate, seed);
      next_arrival_s_ = arrivals_->Next();
    }
  }

  absl::StatusOr<ClusterResult> Whole() {
    for (int32_t i = 0; i < load_.concurrency; ++i) RETURN_IF_ERROR(Add(0));
    while (engine_.now_s() < end_s() || measured_under_way_ > 0) {
      RETURN_IF_ERROR(AddArrivals());
      const StepPlan plan = scheduler_.Schedule();
      if (plan.empty()) {
        if (next_arrival_s_ >= end_s()) break;
        engine_.WaitUntil(next_arrival_s_);
        continue;
      }
      RETURN_IF_ERROR(Step(plan));
    }
    return Result();
  }

 private:
  // A request under way.
  struct UnderWay {
    double arrival_s = 0, first_s = 0, last_s = 0;
    int32_t tokens = 0;
    bool measured = false;
  };

  double end_s() const { return options_.warmup_s + options_.duration_s; }
  bool Measured(double time_s) const { return time_s >= options_.warmup_s && time_s < end_s(); }

  absl::Status AddArrivals() {
    while (arrivals_ && next_arrival_s_ <= engine_.now_s() && next_arrival_s_ < end_s()) {
      RETURN_IF_ERROR(Add(next_arrival_s_));
      next_arrival_s_ = arrivals_->Next();
    }
    return absl::OkStatus();
  }

  absl::Status Add(double arrival_s) {
    Request request = trace_.At(num_added_++);
    const RequestId id = request.id;
    const auto prompt_tokens = static_cast<int64_t>(request.prompt.size());
    const bool measured = Measured(arrival_s);
    result_.requests += measured;
    const absl::Status added = scheduler_.Add(std::move(request));
    if (absl::IsResourceExhausted(added)) {
      result_.refused += measured;
      return absl::OkStatus();
    }
    RETURN_IF_ERROR(added);
    if (measured) prompt_tokens_ += prompt_tokens;
    measured_under_way_ += measured;
    under_way_[id] = {.arrival_s = arrival_s, .measured = measured};
    return absl::OkStatus();
  }

  absl::Status Step(const StepPlan& plan) {
    const double start_s = engine_.now_s();
    ASSIGN_OR_RETURN(const StepResult result, engine_.Execute(plan));
    const double now_s = engine_.now_s();
    NoteStep(plan, start_s, now_s);
    ASSIGN_OR_RETURN(const std::vector<SequenceEvent> events, scheduler_.Update(plan, result));
    for (const SequenceEvent& event : events) {
      NoteToken(event.id, now_s);
      if (event.finish == FinishReason::kNone) continue;
      Finish(event.id);
      if (load_.concurrency > 0 && now_s < end_s()) RETURN_IF_ERROR(Add(now_s));
    }
    return absl::OkStatus();
  }

  void NoteStep(const StepPlan& plan, double start_s, double now_s) {
    if (!Measured(start_s)) return;
    const double seconds = now_s - start_s;
    ++result_.steps;
    cost_.Add(engine_.last_step());
    result_.mixed_steps += std::any_of(plan.sequences.begin(), plan.sequences.end(),
                                       [](const SequenceStep& s) { return s.num_tokens > 1; });
    running_s_ += seconds * scheduler_.num_running();
    const double used =
        1 - static_cast<double>(scheduler_.num_free_blocks()) / scheduler_.num_blocks();
    cache_s_ += seconds * used;
    result_.cache_max = std::max(result_.cache_max, used);
  }

  void NoteToken(RequestId id, double now_s) {
    UnderWay& request = under_way_[id];
    if (Measured(now_s)) ++output_tokens_;
    if (request.measured) {
      if (request.tokens == 0) {
        ttft_ms_.push_back(static_cast<float>(1e3 * (now_s - request.arrival_s)));
      } else {
        itl_ms_.push_back(static_cast<float>(1e3 * (now_s - request.last_s)));
      }
    }
    if (request.tokens++ == 0) request.first_s = now_s;
    request.last_s = now_s;
  }

  void Finish(RequestId id) {
    const UnderWay request = under_way_[id];
    under_way_.erase(id);
    if (!request.measured) return;
    --measured_under_way_;
    const double tpot =
        request.tokens > 1 ? (request.last_s - request.first_s) / (request.tokens - 1) : 0;
    if (request.tokens > 1) tpot_ms_.push_back(static_cast<float>(1e3 * tpot));
    num_good_ +=
        request.first_s - request.arrival_s <= options_.ttft_slo_s && tpot <= options_.tpot_slo_s;
  }

  ClusterResult Result() {
    ClusterResult& r = result_;
    const double seconds = options_.duration_s;
    r.arrivals_per_s = static_cast<double>(r.requests) / seconds;
    r.prompt_tokens_per_s = static_cast<double>(prompt_tokens_) / seconds;
    r.output_tokens_per_s = static_cast<double>(output_tokens_) / seconds;
    r.goodput_per_s = static_cast<double>(num_good_) / seconds;
    if (r.requests > 0) r.goodput_share = static_cast<double>(num_good_) / r.requests;
    r.ttft_ms = Summarize(&ttft_ms_);
    r.itl_ms = Summarize(&itl_ms_);
    r.tpot_ms = Summarize(&tpot_ms_);
    if (r.steps == 0) return r;
    const double all = cost_.seconds();
    r.step_ms = 1e3 * all / static_cast<double>(r.steps);
    r.mixed_steps /= static_cast<double>(r.steps);
    r.sequences_per_rank = running_s_ / all / model_.options().num_ranks();
    r.cache_mean = cache_s_ / all;
    r.preemptions = scheduler_.num_preemptions();
    r.attention = cost_.attention / all;
    r.experts = cost_.experts / all;
    r.exchange = cost_.exchange / all;
    r.leader = cost_.leader / all;
    return r;
  }

  const ClusterModel& model_;
  const RequestTrace& trace_;
  const ClusterLoad load_;
  const ClusterRunOptions options_;
  SimulatedEngine engine_;
  Scheduler scheduler_;
  std::optional<Arrivals> arrivals_;
  double next_arrival_s_ = std::numeric_limits<double>::infinity();
  int64_t num_added_ = 0;
  absl::flat_hash_map<RequestId, UnderWay> under_way_;
  int64_t measured_under_way_ = 0;

  ClusterResult result_;
  StepCost cost_;  // of the measured steps
  double running_s_ = 0, cache_s_ = 0;
  int64_t prompt_tokens_ = 0, output_tokens_ = 0, num_good_ = 0;
  std::vector<float> ttft_ms_, itl_ms_, tpot_ms_;
};

}  // namespace

absl::StatusOr<ClusterResult> RunCluster(const ClusterModel& model, const RequestTrace& trace,
                                         const ClusterLoad& load, uint64_t seed,
                                         const ClusterRunOptions& options) {
  return Run(model, trace, load, seed, options).Whole();
}

}  // namespace latentd
