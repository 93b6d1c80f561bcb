#ifndef LATENTD_ENGINE_MODEL_DUMMY_WEIGHTS_H_
#define LATENTD_ENGINE_MODEL_DUMMY_WEIGHTS_H_

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"

namespace latentd {

// Random weights of the config's shapes in anonymous memory: FP8 with scales where the config has
// quantisation, else its dtype. The same for the same config, on every machine and with any number
// of threads. Normally distributed with a deviation of 1/sqrt(in_features), so that activations and
// logits keep a sane size at any depth; norms are 1, biases and router corrections small.
// RESOURCE_EXHAUSTED, with the numbers, when the machine has not that much memory.
absl::StatusOr<ModelWeights> MakeDummyWeights(const ModelConfig& config,
                                              const LoadProgress& progress);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_DUMMY_WEIGHTS_H_
