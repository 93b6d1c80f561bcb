#include "engine/cpu/cpu_model.h"

#include <algorithm>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "engine/model/quantization.h"
#include "engine/status.h"

namespace latentd {
namespace {

std::vector<float> Floats(const TensorView& tensor) {
  std::vector<float> values(tensor.num_elements());
  ToFloat(tensor, values.data());
  return values;
}

MatrixPart Whole(const LinearWeight& linear) {
  return {.linear = &linear, .row_begin = 0, .num_rows = linear.weight.shape[0]};
}

// Packs matrices and remembers whether memory ran out.
class Packer {
 public:
  Packer(CpuModel& model, ThreadPool& pool, bool quantize_activations)
      : model_(model), pool_(pool), quantize_activations_(quantize_activations) {}

  PackedMatrix operator()(const std::vector<MatrixPart>& parts) {
    PackedMatrix m = Pack(parts, model_.config.quantization, pool_, model_.arena);
    ok_ = ok_ && (m.bf16 != nullptr || m.f32 != nullptr);
    return m;
  }
  // The same for a projection of activations, which are rounded to FP8 for FP8 weights if wanted.
  PackedMatrix Projection(const std::vector<MatrixPart>& parts) {
    PackedMatrix m = (*this)(parts);
    const bool fp8 = std::all_of(parts.begin(), parts.end(), [](const MatrixPart& part) {
      return part.linear->weight.dtype == DType::kF8E4M3;
    });
    if (quantize_activations_ && fp8) {
      const Fp8Quantization& fp8 = *model_.config.quantization;
      m.quantize_input = {.group = fp8.block_cols, .power_of_two_scales = fp8.power_of_two_scales};
    }
    return m;
  }
  PackedMatrix operator()(const LinearWeight& linear) { return Projection({Whole(linear)}); }
  PackedMatrix operator()(const TensorView& tensor) {
    const LinearWeight linear{.weight = tensor, .scale_inv = {}, .bias = {}};
    return (*this)(linear);
  }
  PackedMlp operator()(const MlpWeights& mlp) {
    if (mlp.gate_proj.weight.empty()) return {};  // n_shared_experts 0
    return {.gate_up = Projection({Whole(mlp.gate_proj), Whole(mlp.up_proj)}),
            .down = (*this)(mlp.down_proj),
            .width = static_cast<int>(mlp.gate_proj.weight.shape[0])};
  }
  bool ok() const { return ok_; }

 private:
  CpuModel& model_;
  ThreadPool& pool_;
  const bool quantize_activations_;
  bool ok_ = true;
};

PackedLayer PackLayer(const ModelConfig& config, const LayerWeights& weights, bool moe,
                      const ExpertRange& experts, Packer& pack) {
  PackedLayer layer;
  layer.input_layernorm = Floats(weights.input_layernorm);
  layer.post_attention_layernorm = Floats(weights.post_attention_layernorm);
  if (config.q_lora_rank) {
    layer.q_a = pack(weights.q_a_proj);
    layer.q_a_layernorm = Floats(weights.q_a_layernorm);
    layer.q_b = pack(weights.q_b_proj);
  } else {
    layer.q_b = pack(weights.q_proj);
  }
  layer.kv_a = pack(weights.kv_a_proj_with_mqa);
  layer.kv_a_layernorm = Floats(weights.kv_a_layernorm);
  const int64_t head_rows = config.qk_nope_head_dim + config.v_head_dim;
  for (int64_t head = 0; head < config.num_attention_heads; ++head) {
    layer.w_uk.push_back(pack({{.linear = &weights.kv_b_proj,
                                .row_begin = head * head_rows,
                                .num_rows = config.qk_nope_head_dim,
                                .transposed = true}}));
    layer.w_uv.push_back(pack({{.linear = &weights.kv_b_proj,
                                .row_begin = head * head_rows + config.qk_nope_head_dim,
                                .num_rows = config.v_head_dim}}));
  }
  layer.o = pack(weights.o_proj);
  if (!moe) {
    layer.mlp = pack(weights.mlp);
    return layer;
  }
  layer.mlp = pack(weights.moe.shared_experts);
  layer.router = pack(weights.moe.gate);
  layer.e_score_correction_bias = Floats(weights.moe.e_score_correction_bias);
  layer.experts.resize(config.n_routed_experts);
  for (int32_t e = experts.first; e < experts.first + experts.count; ++e) {
    layer.experts[e] = pack(weights.moe.experts[e]);
  }
  return layer;
}

uint64_t LinearBytes(const LinearWeight& linear) {
  if (linear.weight.empty()) return 0;
  return PackedBytes(linear.weight.shape[0], linear.weight.shape[1], linear.weight.dtype);
}
uint64_t MlpBytes(const MlpWeights& mlp) {
  return LinearBytes(mlp.gate_proj) + LinearBytes(mlp.up_proj) + LinearBytes(mlp.down_proj);
}

absl::Status CheckExperts(const ModelConfig& config, const ModelWeights& weights,
                          const ExpertRange& experts) {
  for (int32_t layer = 0; layer < config.num_hidden_layers; ++layer) {
    if (!config.is_moe_layer(layer)) continue;
    for (int32_t e = experts.first; e < experts.first + experts.count; ++e) {
      if (!weights.layers[layer].moe.experts[e].gate_proj.weight.empty()) continue;
      return absl::InvalidArgumentError(absl::StrCat(
          "layer ", layer, ": the weights of expert ", e, " are not loaded; this rank's are ",
          experts.first, " to ", experts.first + experts.count - 1));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CpuModel>> CpuModel::Build(const ModelConfig& config,
                                                          const ModelWeights& weights,
                                                          int32_t num_positions, ThreadPool& pool,
                                                          bool quantize_activations,
                                                          const Placement& placement) {
  auto model = std::make_unique<CpuModel>();
  model->config = config;
  model->experts = placement.Experts(config.n_routed_experts);
  RETURN_IF_ERROR(CheckExperts(config, weights, model->experts));
  model->weights = weights;
  Packer pack(*model, pool, quantize_activations);
  for (int32_t i = 0; i < config.num_hidden_layers; ++i) {
    model->layers.push_back(
        PackLayer(config, weights.layers[i], config.is_moe_layer(i), model->experts, pack));
    if (!pack.ok()) break;
  }
  model->norm = Floats(weights.norm);
  if (pack.ok()) model->lm_head = pack(weights.lm_head);
  if (!pack.ok()) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "no memory for the packed weights; ", model->arena.bytes_used(), " bytes were allocated"));
  }
  model->rope = std::make_unique<Rope>(config, num_positions);
  return model;
}

uint64_t CpuModel::NumBytes(const ModelConfig& config, const ModelWeights& weights,
                            int32_t num_positions, const Placement& placement) {
  const ExpertRange experts = placement.Experts(config.n_routed_experts);
  uint64_t bytes = PackedBytes(config.vocab_size, config.hidden_size, weights.lm_head.dtype);
  for (const LayerWeights& layer : weights.layers) {
    bytes += LinearBytes(layer.q_proj) + LinearBytes(layer.q_a_proj) + LinearBytes(layer.q_b_proj) +
             LinearBytes(layer.kv_a_proj_with_mqa) + LinearBytes(layer.kv_b_proj) +
             LinearBytes(layer.o_proj) + MlpBytes(layer.mlp) + MlpBytes(layer.moe.shared_experts);
    for (size_t e = 0; e < layer.moe.experts.size(); ++e) {
      if (experts.contains(static_cast<int32_t>(e))) bytes += MlpBytes(layer.moe.experts[e]);
    }
  }
  return bytes + sizeof(float) * uint64_t{static_cast<uint32_t>(num_positions)} *
                     static_cast<uint64_t>(config.qk_rope_head_dim);
}

}  // namespace latentd
