#ifndef LATENTD_ENGINE_MODEL_ROPE_H_
#define LATENTD_ENGINE_MODEL_ROPE_H_

#include <cstdint>
#include <vector>

#include "engine/model/config.h"

namespace latentd {

// Rotary embedding with or without YaRN, as Transformers computes it: inverse frequencies, angles,
// cos and sin each rounded to fp32. Thread-safe.
class Rope {
 public:
  Rope(const ModelConfig& config, int32_t num_positions);

  // out[dim] = x[dim] rotated to `position`; pairs are neighbours in x (rope_interleave) or halves;
  // in `out` they are halves. Not in place.
  void Apply(const float* x, int32_t position, float* out) const;

  const std::vector<float>& cos() const { return cos_; }  // [num_positions, dim / 2]
  const std::vector<float>& sin() const { return sin_; }  // [num_positions, dim / 2]

 private:
  int half_;  // dim / 2
  bool interleave_;
  std::vector<float> cos_;  // [num_positions, dim / 2]
  std::vector<float> sin_;  // [num_positions, dim / 2]
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_ROPE_H_
