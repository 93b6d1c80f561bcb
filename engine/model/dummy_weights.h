#ifndef LATENTD_ENGINE_MODEL_DUMMY_WEIGHTS_H_
#define LATENTD_ENGINE_MODEL_DUMMY_WEIGHTS_H_

#include <array>
#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"

namespace latentd {

// Random weights of the config's shapes in anonymous memory: FP8 with scales where the config has
// quantisation, else its dtype. The same for the same config, on every machine and with any number
// of threads; a rank makes what it holds at `placement`, the same as in a model that is alone.
// Normally distributed with a deviation of 1/sqrt(in_features), so that activations and logits keep
// a sane size at any depth; norms are 1, biases and router corrections small.
// RESOURCE_EXHAUSTED, with the numbers, when the machine has not that much memory.
absl::StatusOr<ModelWeights> MakeDummyWeights(const ModelConfig& config,
                                              const LoadProgress& progress,
                                              const Placement& placement = {});

// The recipe of it, for who makes the same weights elsewhere. Element i of tensor number t is entry
// b of the tensor's 256 values, where b is byte i % 8 of DummyHash(t, i - i % 8) (dummy_hash.h).
struct DummyTensor {
  TensorView* view = nullptr;  // in the ModelWeights given; has no data
  float mean = 0;
  float deviation = 0;  // 0: all elements are `mean`
  int32_t expert = -1;  // as in TensorSpec
};

// Every tensor, in the order of their numbers: 0, 1, 2, ...; gives `weights` its shapes and types.
std::vector<DummyTensor> PlanDummyWeights(const ModelConfig& config, ModelWeights& weights);

std::array<uint8_t, 256> DummyValuesE4m3();  // of all FP8 tensors: their scales have the deviation
std::array<float, 256> DummyValues(const DummyTensor& tensor);  // of the others; bf16 rounds them

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_DUMMY_WEIGHTS_H_
