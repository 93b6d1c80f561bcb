#include "scheduler/engine_core.h"

#include <algorithm>
#include <array>
#include <string>
#include <thread>
#include <utility>
#include <variant>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "engine/status.h"

namespace latentd {
namespace {

// An engine that fails this many steps on end is given a rest before it is tried again; until then
// requests are refused at once, instead of each being led to another failing step.
constexpr int kMaxFailedSteps = 3;
constexpr absl::Duration kRest = absl::Seconds(1);
// How often ready() is asked: of an engine that requests wait for, and of an idle one.
constexpr absl::Duration kReadyInterval = absl::Milliseconds(10);
constexpr absl::Duration kIdleInterval = absl::Milliseconds(100);

absl::Status StoppedError() { return absl::UnavailableError("the engine core has stopped"); }

absl::Status FailedStepError(const absl::Status& cause) {
  return absl::UnavailableError(absl::StrCat("the engine failed: ", cause.message()));
}

}  // namespace

class EngineCore::Impl {
 public:
  Impl(const SchedulerConfig& config, Engine* engine, Callbacks callbacks,
       absl::Duration recovery_timeout)
      : max_waiting_(config.max_waiting),
        max_running_(config.max_running),
        recovery_timeout_(recovery_timeout),
        info_(engine->info()),
        engine_(engine),
        callbacks_(std::move(callbacks)),
        scheduler_(config, info_) {
    {
      absl::MutexLock lock(&mutex_);
      Publish();
    }
    thread_ = std::thread([this] { Run(); });
  }

  absl::Status Submit(Request request) ABSL_LOCKS_EXCLUDED(mutex_) {
    const absl::Status fits = CheckRequest(request, info_);
    absl::MutexLock lock(&mutex_);
    if (stopping_) return StoppedError();
    if (!fits.ok()) return fits;
    if (!refusal_.ok()) {
      if (absl::Now() < refuse_until_) return refusal_;
      refusal_ = absl::OkStatus();
    }
    const bool background = request.background;
    const int32_t num_waiting = num_not_started_[background] + num_submitted_[background];
    if (num_waiting >= max_waiting_) {
      return absl::ResourceExhaustedError(
          absl::StrCat(num_waiting, " requests are waiting; max_waiting is ", max_waiting_));
    }
    inbox_.emplace_back(std::move(request));
    ++num_submitted_[background];
    return absl::OkStatus();
  }

  void Cancel(RequestId id) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (!stopping_) inbox_.emplace_back(id);
  }

  CoreStats stats() const ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    CoreStats stats = stats_;
    stats.num_waiting += num_submitted_[false];
    stats.num_background_waiting += num_submitted_[true];
    if (!stats.ready) stats.not_ready += absl::Now() - not_ready_since_;
    return stats;
  }

  int32_t max_running() const {
    return std::min(max_running_, info_.max_sequences) * info_.num_dp_ranks;
  }

  void Stop() ABSL_LOCKS_EXCLUDED(mutex_, join_mutex_) {
    {
      absl::MutexLock lock(&mutex_);
      stopping_ = true;
    }
    absl::MutexLock lock(&join_mutex_);
    if (thread_.joinable()) thread_.join();
  }

 private:
  using Message = std::variant<Request, RequestId>;  // Submit, Cancel

  // ---- the core thread; scheduler_ is its own ----

  void Run() {
    while (TakeMessages()) {
      if (WatchEngine()) RunStep();
    }
    Emit(scheduler_.FailAll(StoppedError()));
    absl::MutexLock lock(&mutex_);
    Publish();
  }

  // Waits until there is something to do, or it is time to look at the engine, and gives the
  // scheduler what came in. False once stopped.
  bool TakeMessages() ABSL_LOCKS_EXCLUDED(mutex_) {
    std::vector<Message> messages;
    bool stopping;
    {
      absl::MutexLock lock(&mutex_);
      after_pause_ = scheduler_.idle() || !ready_;
      if (after_pause_) {
        mutex_.AwaitWithTimeout(absl::Condition(this, &Impl::HasMessages),
                                scheduler_.idle() ? kIdleInterval : kReadyInterval);
      }
      messages = EmptyInbox();
      stopping = stopping_;
    }
    Apply(std::move(messages));
    return !stopping;
  }

  std::vector<Message> EmptyInbox() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const bool background : {false, true}) {
      num_not_started_[background] += std::exchange(num_submitted_[background], 0);
    }
    return std::exchange(inbox_, {});
  }

  void Apply(std::vector<Message> messages) {
    for (Message& message : messages) {
      if (const RequestId* id = std::get_if<RequestId>(&message)) {
        scheduler_.Cancel(*id);
      } else {
        // Submit has checked all that a caller may get wrong.
        const absl::Status added = scheduler_.Add(std::move(std::get<Request>(message)));
        LATENTD_CHECK(added.ok());
      }
    }
  }

  // Whether the engine takes a step. Notes and tells when that changes, and ends everything when it
  // takes too long.
  bool WatchEngine() ABSL_LOCKS_EXCLUDED(mutex_) {
    const bool ready = engine_->ready();
    if (ready != ready_) {
      const absl::Time now = absl::Now();
      {
        absl::MutexLock lock(&mutex_);
        stats_.ready = ready;
        if (ready) {
          stats_.not_ready += now - not_ready_since_;
        } else {
          not_ready_since_ = now;
        }
        if (std::exchange(timed_out_, false) && !loss_told_) refusal_ = absl::OkStatus();
      }
      ready_ = ready;
      if (callbacks_.on_ready_change) callbacks_.on_ready_change(ready);
    }
    if (!ready) AwaitRecovery();
    return ready;
  }

  void AwaitRecovery() ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::Duration not_ready;
    {
      absl::MutexLock lock(&mutex_);
      not_ready = absl::Now() - not_ready_since_;
    }
    std::vector<SequenceEvent> events;
    absl::Status lost;
    if (!loss_told_ && engine_->lost()) {
      lost = absl::UnavailableError(
          absl::StrCat("the engine failed and cannot be made ready again", last_abort_));
      events = FailEverything(lost, absl::InfiniteFuture());
    } else if (!loss_told_ && !timed_out_ && not_ready >= recovery_timeout_) {
      timed_out_ = true;
      const absl::Status error = absl::UnavailableError(absl::StrCat(
          "the engine was not ready again within ", absl::FormatDuration(recovery_timeout_),
          " (recovery_timeout)", last_abort_));
      events = FailEverything(error, absl::InfiniteFuture());
      num_unrecovered_ += static_cast<int64_t>(events.size());
    }
    {
      absl::MutexLock lock(&mutex_);
      Publish();  // cancels came in, perhaps
    }
    Emit(std::move(events));
    if (!lost.ok()) TellLoss(lost);
  }

  void RunStep() ABSL_LOCKS_EXCLUDED(mutex_) {
    const absl::Time start = absl::Now();
    const StepPlan plan = scheduler_.Schedule();
    const absl::Time scheduled = absl::Now();
    {
      absl::MutexLock lock(&mutex_);
      Publish();
      if (!plan.empty()) stats_.step_started_at = scheduled;
    }
    if (plan.empty()) return;  // only cancels came in
    Emit(scheduler_.started());

    absl::StatusOr<StepResult> result = engine_->Execute(plan);
    const absl::Time executed = absl::Now();

    absl::StatusOr<std::vector<SequenceEvent>> events =
        result.ok() ? scheduler_.Update(plan, *result) : result.status();
    const bool aborted = (absl::IsAborted(result.status()) || absl::IsCancelled(result.status())) &&
                         !engine_->lost();
    absl::Status lost;  // why, once the engine is
    if (events.ok()) {
      num_failed_steps_ = 0;
    } else if (aborted) {
      last_abort_ = absl::StrCat(": ", events.status().message());
      events = scheduler_.Restart(plan, events.status());
      num_unrecovered_ += static_cast<int64_t>(events->size());
    } else {
      ++num_failed_steps_;
      const absl::Status error = FailedStepError(events.status());
      if (engine_->lost()) lost = error;
      events = Fail(plan, error);
    }
    const absl::Time updated = absl::Now();
    {
      absl::MutexLock lock(&mutex_);
      ++stats_.num_steps;
      stats_.step_started_at = absl::InfinitePast();
      Publish();
    }
    Emit(*std::move(events));
    if (!lost.ok()) TellLoss(lost);
    if (callbacks_.on_step) {
      callbacks_.on_step(
          {.num_sequences = static_cast<int32_t>(plan.sequences.size()),
           .num_tokens = static_cast<int32_t>(plan.tokens.size()),
           .num_background_tokens = scheduler_.num_background_tokens(),
           .num_sampled = result.ok() ? static_cast<int32_t>(result->sampled.size()) : 0,
           .schedule = scheduled - start,
           .execute = executed - scheduled,
           .update = updated - executed,
           .device = result.ok() ? result->device : std::nullopt,
           .after_pause = after_pause_,
           .aborted = aborted});
    }
  }

  // Ends a failed step: its requests fail; all do if the engine keeps failing, or is lost.
  std::vector<SequenceEvent> Fail(const StepPlan& plan, const absl::Status& error)
      ABSL_LOCKS_EXCLUDED(mutex_) {
    std::vector<SequenceEvent> events = scheduler_.Abort(plan, error);
    const bool lost = engine_->lost();
    if (num_failed_steps_ < kMaxFailedSteps && !lost) return events;
    std::vector<SequenceEvent> others =
        FailEverything(error, lost ? absl::InfiniteFuture() : absl::Now() + kRest);
    std::move(others.begin(), others.end(), std::back_inserter(events));
    return events;
  }

  // Ends all requests with `error`, and refuses more with it until then.
  std::vector<SequenceEvent> FailEverything(const absl::Status& error, absl::Time refuse_until)
      ABSL_LOCKS_EXCLUDED(mutex_) {
    std::vector<Message> messages;
    {
      absl::MutexLock lock(&mutex_);
      refuse_until_ = refuse_until;
      refusal_ = error;
      messages = EmptyInbox();  // no request follows them
    }
    Apply(std::move(messages));
    return scheduler_.FailAll(error);
  }

  // After the events that end all requests.
  void TellLoss(const absl::Status& why) {
    if (!std::exchange(loss_told_, true) && callbacks_.on_lost) callbacks_.on_lost(why);
  }

  void Emit(std::vector<SequenceEvent> events) {
    if (!events.empty()) callbacks_.on_events(std::move(events));
  }

  void Publish() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    for (const bool background : {false, true}) {
      num_not_started_[background] = scheduler_.num_not_started(background);
    }
    stats_.num_background_waiting = scheduler_.num_background_waiting();
    stats_.num_background_running = scheduler_.num_background_running();
    stats_.num_waiting = scheduler_.num_waiting() - stats_.num_background_waiting;
    stats_.num_running = scheduler_.num_running() - stats_.num_background_running;
    stats_.num_blocks = scheduler_.num_blocks();
    stats_.num_free_blocks = scheduler_.num_free_blocks();
    stats_.num_background_preemptions = scheduler_.num_background_preemptions();
    stats_.num_preemptions = scheduler_.num_preemptions() - stats_.num_background_preemptions;
    stats_.prompt_tokens = scheduler_.prompt_tokens();
    stats_.cached_tokens = scheduler_.cached_tokens();
    stats_.num_recoveries = scheduler_.num_restarts();
    stats_.num_recovered = scheduler_.num_recovered();
    stats_.num_unrecovered = num_unrecovered_;
  }

  bool HasMessages() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !inbox_.empty();
  }

  // Constant after construction.
  const int32_t max_waiting_;
  const int32_t max_running_;  // of a rank, as configured
  const absl::Duration recovery_timeout_;
  const EngineInfo info_;
  Engine* const engine_;
  const Callbacks callbacks_;

  // The core thread's.
  Scheduler scheduler_;
  int num_failed_steps_ = 0;  // on end
  bool loss_told_ = false;
  bool ready_ = true;       // the engine, when it was last asked
  bool timed_out_ = false;  // it is not, for recovery_timeout now
  std::string last_abort_;  // ": " and why the latest lost step failed
  int64_t num_unrecovered_ = 0;
  bool after_pause_ = true;  // the step under way came after a time without requests

  // Never held during Schedule, Execute, Update or a callback.
  mutable absl::Mutex mutex_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<Message> inbox_ ABSL_GUARDED_BY(mutex_);
  // [background]: requests in the inbox; and of the scheduler, when it was last seen.
  std::array<int32_t, 2> num_submitted_ ABSL_GUARDED_BY(mutex_) = {};
  std::array<int32_t, 2> num_not_started_ ABSL_GUARDED_BY(mutex_) = {};
  absl::Time refuse_until_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  absl::Status refusal_ ABSL_GUARDED_BY(mutex_);  // not OK: refuse until refuse_until_
  absl::Time not_ready_since_ ABSL_GUARDED_BY(mutex_) = absl::InfinitePast();
  CoreStats stats_ ABSL_GUARDED_BY(mutex_);

  absl::Mutex join_mutex_ ABSL_ACQUIRED_BEFORE(mutex_);
  std::thread thread_ ABSL_GUARDED_BY(join_mutex_);
};

EngineCore::EngineCore(const SchedulerConfig& config, Engine* engine, Callbacks callbacks,
                       absl::Duration recovery_timeout)
    : impl_(std::make_unique<Impl>(config, engine, std::move(callbacks), recovery_timeout)) {}

EngineCore::~EngineCore() { Stop(); }

absl::Status EngineCore::Submit(Request request) { return impl_->Submit(std::move(request)); }

void EngineCore::Cancel(RequestId id) { impl_->Cancel(id); }

CoreStats EngineCore::stats() const { return impl_->stats(); }

int32_t EngineCore::max_running() const { return impl_->max_running(); }

void EngineCore::Stop() { impl_->Stop(); }

}  // namespace latentd
