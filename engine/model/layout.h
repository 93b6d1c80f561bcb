#ifndef LATENTD_ENGINE_MODEL_LAYOUT_H_
#define LATENTD_ENGINE_MODEL_LAYOUT_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"

namespace latentd {

enum class WeightPart {
  kEmbedding,
  kAttention,
  kDenseMlp,
  kRoutedExperts,
  kSharedExperts,
  kRouter,
  kNorms,
  kHead,
  kMtp,  // everything of the MTP layers
};
inline constexpr int kNumWeightParts = 9;

std::string_view WeightPartName(WeightPart part);  // "routed experts"

enum class WeightKind {
  kEmbedding,
  kLinear,  // of a projection: FP8 with scales, bf16 or f32
  kBias,    // of a projection
  kNorm,
  kUnquantized,     // a matrix that is never FP8: mlp.gate, eh_proj
  kCorrectionBias,  // mlp.gate.e_score_correction_bias
};

inline constexpr int32_t kNoExpert = -1;

// One tensor that a model of the architecture has.
struct TensorSpec {
  std::string name;  // as in the checkpoint: "model.layers.3.self_attn.o_proj.weight"
  std::vector<int64_t> shape;
  WeightKind kind;
  WeightPart part;
  int32_t expert = kNoExpert;  // the routed expert that it is of
};

// Meets every tensor of a model, with the place in ModelWeights where it belongs. Loading, random
// weights and the memory plan are three visitors of this one list.
class WeightVisitor {
 public:
  virtual ~WeightVisitor() = default;
  virtual void Tensor(const TensorSpec& spec, TensorView& view) = 0;
  // A kLinear, whose scales, if it has any, are the visitor's to add. Its bias comes by Tensor().
  virtual void Linear(const TensorSpec& spec, LinearWeight& linear) = 0;
};

// Whether a rank that holds `experts` holds this tensor.
inline bool Holds(const ExpertRange& experts, const TensorSpec& spec) {
  return spec.expert == kNoExpert || experts.contains(spec.expert);
}

// The main model: embedding, layers, norm and, unless it is tied, the head. Shapes `weights`.
void VisitWeights(const ModelConfig& config, ModelWeights& weights, WeightVisitor& visitor);

// MTP layer `index` in [0, num_nextn_predict_layers). It is visited with views that nobody keeps:
// its place in ModelWeights comes with speculative decoding.
void VisitMtpLayer(const ModelConfig& config, int32_t index, WeightVisitor& visitor);

// [ceil(rows / block_rows), ceil(cols / block_cols)] of a [rows, cols] weight.
std::vector<int64_t> ScaleShape(const Fp8Quantization& fp8, const std::vector<int64_t>& shape);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_LAYOUT_H_
