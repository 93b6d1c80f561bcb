#ifndef LATENTD_ENGINE_ENGINE_H_
#define LATENTD_ENGINE_ENGINE_H_

#include <cstdint>

#include "absl/status/statusor.h"
#include "engine/step.h"

namespace latentd {

struct EngineInfo {
  int32_t num_blocks = 0;       // KV cache blocks of each attention replica
  int32_t num_dp_ranks = 1;     // attention replicas
  int32_t max_step_tokens = 0;  // most tokens of one replica in a plan
  int32_t max_sequences = 0;    // most sequences of one replica in a plan
  int32_t max_model_len = 0;    // prompt + completion, in tokens
  int32_t vocab_size = 0;
};

// Runs the model: FakeEngine (tests), CpuEngine (reference), CudaEngine, RemoteEngine (all ranks of
// a group).
class Engine {
 public:
  virtual ~Engine() = default;

  // Constant for the life of the engine. Any thread.
  virtual EngineInfo info() const = 0;

  // Computes `plan`, fills the cache, and returns the sampled tokens. Blocks until the step is
  // done. Called by one thread at a time.
  //
  // After an error the contents of the cache are undefined, but unless it is lost() the engine is
  // not: a later plan may succeed if it computes its sequences again from their first token.
  // ABORTED means that the step failed through no fault of its sequences, such as by the loss of a
  // rank: computed again, once the engine is ready(), they go on as if nothing had happened.
  // CANCELLED means that besides nothing was begun: the cache was lost between two steps.
  virtual absl::StatusOr<StepResult> Execute(const StepPlan& plan) = 0;

  // False while Execute() would fail with ABORTED: a rank is missing, the group is being formed
  // again. Any thread.
  virtual bool ready() const { return true; }

  // True once the engine has failed in a way that only a new process mends: Execute() has failed
  // and always will. Any thread.
  virtual bool lost() const { return false; }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_ENGINE_H_
