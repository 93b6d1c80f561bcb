#ifndef LATENTD_SCHEDULER_ENGINE_CORE_H_
#define LATENTD_SCHEDULER_ENGINE_CORE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/engine.h"
#include "scheduler/request.h"
#include "scheduler/scheduler.h"

namespace latentd {

// What the core did in one step; for metrics.
struct StepReport {
  int32_t num_sequences = 0;
  int32_t num_tokens = 0;             // computed
  int32_t num_background_tokens = 0;  // of those, of background requests
  int32_t num_sampled = 0;
  absl::Duration schedule, execute, update;
  std::optional<DeviceTimes> device = std::nullopt;  // as the engine told
  bool after_pause = false;  // nothing was to be done before it, or there was no engine to do it
  bool aborted = false;      // the engine lost it: its sequences are computed again
};

// A picture of the core at one moment.
struct CoreStats {
  // Background requests are counted apart.
  int32_t num_waiting = 0;
  int32_t num_running = 0;
  int32_t num_background_waiting = 0;
  int32_t num_background_running = 0;
  int32_t num_blocks = 0;       // all dp_ranks
  int32_t num_free_blocks = 0;  // cached but unused blocks are free
  int64_t num_steps = 0;
  int64_t num_preemptions = 0;
  int64_t num_background_preemptions = 0;  // not among those
  int64_t prompt_tokens = 0;               // admitted
  int64_t cached_tokens = 0;               // of those, found in the prefix cache
  bool ready = true;  // the engine; false while its group is being formed again
  absl::Duration not_ready = absl::ZeroDuration();  // all the time that it was not
  int64_t num_recoveries = 0;                       // lost steps, whose sequences start again
  int64_t num_recovered = 0;                        // sequences that started again
  int64_t num_unrecovered = 0;  // requests that max_recoveries or recovery_timeout ended
  // InfinitePast while no step runs; else when the running one began. A watchdog judges it: Execute
  // may never return.
  absl::Time step_started_at = absl::InfinitePast();
};

// The core thread: inbox -> Schedule -> Execute -> Update -> events, over and over.
//
// Submit, Cancel and stats may be called from any thread and never wait for a step.
//
// When a step fails, its requests end with kFailed and UNAVAILABLE, and the others go on. After
// three failed steps on end all requests end so, and for a second Submit refuses with the engine's
// error; then the next request is a new try. When the engine is lost, all requests end so at once,
// and Submit refuses for good.
//
// When a step fails with ABORTED nothing ends: no step is begun until the engine is ready() again,
// then all is computed again and the events go on where they were (Scheduler::Restart). While it is
// not ready requests are taken and cancelled as ever. When that lasts for recovery_timeout all
// requests end with UNAVAILABLE, and Submit refuses until the engine is ready.
class EngineCore {
 public:
  struct Callbacks {
    // Called by the core thread, in order, and must not block: the events of one step together.
    std::function<void(std::vector<SequenceEvent>)> on_events;
    std::function<void(const StepReport&)> on_step = nullptr;  // may be empty
    // Called once, by the core thread, after the events that end all requests; may be empty. With
    // what they ended with.
    std::function<void(const absl::Status&)> on_lost = nullptr;
    // Called by the core thread when Engine::ready() has changed, or is false at the start; within
    // a tenth of a second, but not within a step. May be empty.
    std::function<void(bool ready)> on_ready_change = nullptr;
  };

  // `engine` is not owned and must outlive the core. Starts the thread.
  EngineCore(const SchedulerConfig& config, Engine* engine, Callbacks callbacks,
             absl::Duration recovery_timeout = absl::Minutes(5));
  ~EngineCore();  // Stop()

  // Hands a request over. RESOURCE_EXHAUSTED when max_waiting requests of its class wait already,
  // INVALID_ARGUMENT when it could never fit, UNAVAILABLE after Stop() and as said above. After OK
  // its events follow, ending with a finish, kFailed, or nothing more after Cancel().
  // REQUIRES: no other request has or had this id.
  absl::Status Submit(Request request);

  // Forgets a request; its blocks are free at the next step. No-op if unknown or finished. Events
  // that are on their way may still arrive.
  void Cancel(RequestId id);

  CoreStats stats() const;

  // Sequences that run at once, at most: all dp_ranks.
  int32_t max_running() const;

  // Ends the thread after the running step. What is unfinished gets kFailed with UNAVAILABLE. Any
  // thread, any number of times, but not from within a callback.
  void Stop();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_ENGINE_CORE_H_
