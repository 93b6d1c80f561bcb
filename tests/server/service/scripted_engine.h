#ifndef LATENTD_TESTS_SERVER_SERVICE_SCRIPTED_ENGINE_H_
#define LATENTD_TESTS_SERVER_SERVICE_SCRIPTED_ENGINE_H_

#include <cstdint>
#include <map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "engine/engine.h"

namespace latentd {

// An engine that says what it is told to, when it is told to: for tests of what the service makes
// of an answer, and of what happens between two steps. Thread-safe.
class ScriptedEngine : public Engine {
 public:
  explicit ScriptedEngine(const EngineInfo& info) : info_(info) {}

  EngineInfo info() const override { return info_; }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override;

  // Every answer from now on is these tokens, the last one over and over.
  void Say(std::vector<TokenId> tokens);

  // From now on a step waits until Allow() lets it go on.
  void Hold();
  void Allow(int num_steps);
  void Release();  // no holding any more

  // Until that many steps have begun in all.
  void AwaitStep(int64_t num_steps);
  int64_t num_steps() const;

  // The next step fails with it.
  void Fail(absl::Status status);

  // The parameters that the last sampled sequence came with.
  SamplingParams last_sampling() const;

 private:
  const EngineInfo info_;
  mutable absl::Mutex mutex_;
  std::vector<TokenId> script_ ABSL_GUARDED_BY(mutex_) = {5};
  std::map<RequestId, int32_t> first_position_ ABSL_GUARDED_BY(mutex_);
  bool holding_ ABSL_GUARDED_BY(mutex_) = false;
  int num_allowed_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t num_steps_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status failure_ ABSL_GUARDED_BY(mutex_);
  SamplingParams last_sampling_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_SERVICE_SCRIPTED_ENGINE_H_
