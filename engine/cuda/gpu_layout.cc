#include "engine/cuda/gpu_layout.h"

#include <utility>

namespace latentd {
namespace {

int64_t Blocks(int64_t size) { return (size + kQuantGroup - 1) / kQuantGroup; }

// The dims that a layer's weights have on the GPU.
struct Dims {
  explicit Dims(const ModelConfig& config)
      : fp8(config.quantization.has_value()),
        hidden(config.hidden_size),
        heads(config.num_attention_heads),
        latent(config.kv_lora_rank),
        nope(config.qk_nope_head_dim),
        value(config.v_head_dim),
        query(heads * config.qk_head_dim()) {}

  bool fp8;
  int hidden;
  int heads;
  int latent;
  int nope;
  int value;
  int query;  // of all heads
};

WeightMatrix TakeMatrix(const Dims& dims, int num_groups, int n, int k, Carver& carver) {
  WeightMatrix matrix;
  matrix.num_groups = num_groups;
  matrix.n = n;
  matrix.k = k;
  const size_t elements = size_t(num_groups) * size_t(n) * size_t(k);
  if (!dims.fp8) {
    matrix.bf16 = carver.Take<__nv_bfloat16>(elements);
    return matrix;
  }
  matrix.scale_stride = static_cast<int>((Blocks(k) + 3) / 4 * 4);
  matrix.fp8 = carver.Take<__nv_fp8_e4m3>(elements);
  matrix.scales = carver.Take<float>(size_t(num_groups * Blocks(n)) * size_t(matrix.scale_stride));
  return matrix;
}

GpuLayer TakeLayer(const ModelConfig& config, const Dims& dims, const ExpertRange& experts,
                   bool moe, bool gate_f32, Carver& carver) {
  GpuLayer layer;
  const int lora = config.q_lora_rank.value_or(0);
  layer.input_layernorm = carver.Take<float>(dims.hidden);
  layer.qkv_a = TakeMatrix(dims, 1, (lora > 0 ? lora : dims.query) + config.latent_dim(),
                           dims.hidden, carver);
  if (lora > 0) {
    layer.q_a_layernorm = carver.Take<float>(lora);
    layer.q_b = TakeMatrix(dims, 1, dims.query, lora, carver);
  }
  layer.kv_a_layernorm = carver.Take<float>(dims.latent);
  layer.w_uk = carver.Take<__nv_bfloat16>(size_t(dims.heads) * size_t(dims.nope * dims.latent));
  layer.w_uv = carver.Take<__nv_bfloat16>(size_t(dims.heads) * size_t(dims.value * dims.latent));
  layer.o = TakeMatrix(dims, 1, dims.hidden, dims.heads * dims.value, carver);
  layer.post_attention_layernorm = carver.Take<float>(dims.hidden);

  const int groups = moe ? experts.count + config.n_shared_experts : 1;
  layer.mlp.width = moe ? config.moe_intermediate_size : config.intermediate_size;
  layer.mlp.gate_up = TakeMatrix(dims, groups, 2 * layer.mlp.width, dims.hidden, carver);
  layer.mlp.down = TakeMatrix(dims, groups, dims.hidden, layer.mlp.width, carver);
  if (!moe) return layer;
  const size_t router = size_t(config.n_routed_experts) * size_t(dims.hidden);
  if (gate_f32) {
    layer.gate_f32 = carver.Take<float>(router);
  } else {
    layer.gate_bf16 = carver.Take<__nv_bfloat16>(router);
  }
  layer.correction_bias = carver.Take<float>(config.n_routed_experts);
  return layer;
}

// The memory is the loader's, and constant for everybody else.
template <typename T>
std::byte* Writable(const T* data) {
  return reinterpret_cast<std::byte*>(const_cast<T*>(data));
}

// Collects the copies of a model.
class CopyPlanner {
 public:
  std::vector<WeightCopy> Take() { return std::move(copies_); }

  // A whole tensor of any shape as it lies.
  void Whole(const TensorView& source, const float* target) {
    Add(Rows(source), DType::kF32, Writable(target));
  }
  void Whole(const TensorView& source, const __nv_bfloat16* target) {
    Add(Rows(source), DType::kBF16, Writable(target));
  }

  // All of a projection, to rows from `row` on of `group`.
  void Linear(const LinearWeight& linear, const WeightMatrix& matrix, int64_t row = 0,
              int64_t group = 0) {
    Part(linear.weight, linear.scale_inv, matrix, group * matrix.n + row,
         group * Blocks(matrix.n) + row / kQuantGroup);
  }

  // A dense MLP or one expert.
  void Mlp(const MlpWeights& stored, const GpuMlp& mlp, int64_t group) {
    GateUp(stored, mlp, /*first_row=*/0, group);
    Down(stored.down_proj, mlp, /*first_col=*/0, group);
  }

  // The shared experts, which are stored as one MLP: cut into groups from `first_group` on.
  void SharedExperts(const MlpWeights& stored, const GpuMlp& mlp, int64_t first_group,
                     int64_t num_groups) {
    for (int64_t i = 0; i < num_groups; ++i) {
      GateUp(stored, mlp, i * mlp.width, first_group + i);
      Down(stored.down_proj, mlp, i * mlp.width, first_group + i);
    }
  }

  // Rows `head_begin` .. + dim of each head of kv_b_proj.
  void HeadPart(const LinearWeight& kv_b, int64_t head_rows, int64_t head_begin, int64_t dim,
                const __nv_bfloat16* target) {
    WeightCopy copy = Rows(kv_b.weight);
    copy.scale_inv = kv_b.scale_inv.shape.empty() ? nullptr : &kv_b.scale_inv;
    copy.row_begin = head_begin;
    copy.num_rows = copy.num_rows / head_rows * dim;
    copy.block_rows = copy.target_block_rows = dim;
    copy.source_block_rows = head_rows;
    Add(copy, DType::kBF16, Writable(target));
  }

 private:
  static constexpr int64_t kInterleave = 8;  // rows of gate_proj, then as many of up_proj

  // All of a tensor in one block.
  static WeightCopy Rows(const TensorView& source) {
    WeightCopy copy;
    copy.source = &source;
    copy.num_rows = source.shape[0];
    copy.num_cols = copy.target_cols = copy.source_cols();
    copy.block_rows = copy.source_block_rows = copy.target_block_rows = copy.num_rows;
    return copy;
  }

  void Add(WeightCopy copy, DType dtype, std::byte* target) {
    copy.target_dtype = dtype;
    copy.target = target;
    copies_.push_back(copy);
  }

  // Elements of `copy` into a matrix, to rows from `row` on.
  void AddElements(const WeightCopy& copy, const WeightMatrix& matrix, int64_t row) {
    if (matrix.is_fp8()) {
      Add(copy, DType::kF8E4M3, Writable(matrix.fp8 + row * matrix.k));
    } else {
      Add(copy, DType::kBF16, Writable(matrix.bf16 + row * matrix.k));
    }
  }

  // A projection's elements to `row`, its scales to `scale_row` of the matrix.
  void Part(const TensorView& weight, const TensorView& scale_inv, const WeightMatrix& matrix,
            int64_t row, int64_t scale_row) {
    AddElements(Rows(weight), matrix, row);
    if (!matrix.is_fp8()) return;
    WeightCopy scales = Rows(scale_inv);
    scales.target_cols = matrix.scale_stride;
    Add(scales, DType::kF32, Writable(matrix.scales + scale_row * matrix.scale_stride));
  }

  // Rows first_row .. + width of both projections, interleaved.
  void GateUp(const MlpWeights& stored, const GpuMlp& mlp, int64_t first_row, int64_t group) {
    const WeightMatrix& matrix = mlp.gate_up;
    for (const bool up : {false, true}) {
      const LinearWeight& linear = up ? stored.up_proj : stored.gate_proj;
      WeightCopy rows = Rows(linear.weight);
      rows.row_begin = first_row;
      rows.num_rows = mlp.width;
      rows.block_rows = rows.source_block_rows = kInterleave;
      rows.target_block_rows = 2 * kInterleave;
      AddElements(rows, matrix, group * matrix.n + (up ? kInterleave : 0));
      if (!matrix.is_fp8()) continue;
      WeightCopy scales = Rows(linear.scale_inv);
      scales.row_begin = first_row / kQuantGroup;
      scales.num_rows = Blocks(mlp.width);
      scales.block_rows = scales.source_block_rows = scales.target_block_rows = scales.num_rows;
      scales.target_cols = matrix.scale_stride;
      const int64_t scale_row = (2 * group + (up ? 1 : 0)) * scales.num_rows;
      Add(scales, DType::kF32, Writable(matrix.scales + scale_row * matrix.scale_stride));
    }
  }

  // Columns first_col .. + width.
  void Down(const LinearWeight& stored, const GpuMlp& mlp, int64_t first_col, int64_t group) {
    const WeightMatrix& matrix = mlp.down;
    WeightCopy rows = Rows(stored.weight);
    rows.col_begin = first_col;
    rows.num_cols = rows.target_cols = mlp.width;
    AddElements(rows, matrix, group * matrix.n);
    if (!matrix.is_fp8()) return;
    WeightCopy scales = Rows(stored.scale_inv);
    scales.col_begin = first_col / kQuantGroup;
    scales.num_cols = Blocks(mlp.width);
    scales.target_cols = matrix.scale_stride;
    Add(scales, DType::kF32,
        Writable(matrix.scales + group * Blocks(matrix.n) * matrix.scale_stride));
  }

  std::vector<WeightCopy> copies_;
};

void PlanLayer(const ModelConfig& config, const Dims& dims, const ExpertRange& experts, bool moe,
               const LayerWeights& stored, const GpuLayer& layer, CopyPlanner& plan) {
  plan.Whole(stored.input_layernorm, layer.input_layernorm);
  const LinearWeight& q_a = config.q_lora_rank ? stored.q_a_proj : stored.q_proj;
  plan.Linear(q_a, layer.qkv_a);
  plan.Linear(stored.kv_a_proj_with_mqa, layer.qkv_a, q_a.weight.shape[0]);
  if (config.q_lora_rank) {
    plan.Whole(stored.q_a_layernorm, layer.q_a_layernorm);
    plan.Linear(stored.q_b_proj, layer.q_b);
  }
  plan.Whole(stored.kv_a_layernorm, layer.kv_a_layernorm);
  const int64_t head_rows = dims.nope + dims.value;
  plan.HeadPart(stored.kv_b_proj, head_rows, 0, dims.nope, layer.w_uk);
  plan.HeadPart(stored.kv_b_proj, head_rows, dims.nope, dims.value, layer.w_uv);
  plan.Linear(stored.o_proj, layer.o);
  plan.Whole(stored.post_attention_layernorm, layer.post_attention_layernorm);
  if (!moe) return plan.Mlp(stored.mlp, layer.mlp, 0);
  for (int32_t i = 0; i < experts.count; ++i) {
    plan.Mlp(stored.moe.experts[experts.first + i], layer.mlp, i);
  }
  plan.SharedExperts(stored.moe.shared_experts, layer.mlp, experts.count, config.n_shared_experts);
  if (layer.gate_f32 != nullptr) {
    plan.Whole(stored.moe.gate, layer.gate_f32);
  } else {
    plan.Whole(stored.moe.gate, layer.gate_bf16);
  }
  plan.Whole(stored.moe.e_score_correction_bias, layer.correction_bias);
}

}  // namespace

GpuWeights LayOutWeights(const ModelConfig& config, int32_t max_model_len,
                         const ModelWeights* stored, Carver& carver, const Placement& placement) {
  const Dims dims(config);
  const ExpertRange experts = placement.Experts(config.n_routed_experts);
  GpuWeights weights;
  const size_t vocabulary = size_t(config.vocab_size) * size_t(dims.hidden);
  weights.embed_tokens = carver.Take<__nv_bfloat16>(vocabulary);
  for (int32_t i = 0; i < config.num_hidden_layers; ++i) {
    const bool gate_f32 = stored == nullptr ? config.dtype_bytes == 4
                                            : stored->layers[i].moe.gate.dtype == DType::kF32;
    weights.layers.push_back(
        TakeLayer(config, dims, experts, config.is_moe_layer(i), gate_f32, carver));
  }
  weights.norm = carver.Take<float>(dims.hidden);
  weights.lm_head =
      config.tie_word_embeddings ? weights.embed_tokens : carver.Take<__nv_bfloat16>(vocabulary);
  const size_t angles = size_t(max_model_len) * size_t(config.qk_rope_head_dim / 2);
  weights.rope.cos = carver.Take<float>(angles);
  weights.rope.sin = carver.Take<float>(angles);
  weights.rope.interleave = config.rope_interleave;
  return weights;
}

std::vector<WeightCopy> PlanCopies(const ModelConfig& config, const ModelWeights& stored,
                                   const GpuWeights& gpu, const Placement& placement) {
  const Dims dims(config);
  const ExpertRange experts = placement.Experts(config.n_routed_experts);
  CopyPlanner plan;
  plan.Whole(stored.embed_tokens, gpu.embed_tokens);
  for (int32_t i = 0; i < config.num_hidden_layers; ++i) {
    PlanLayer(config, dims, experts, config.is_moe_layer(i), stored.layers[i], gpu.layers[i], plan);
  }
  plan.Whole(stored.norm, gpu.norm);
  if (!config.tie_word_embeddings) plan.Whole(stored.lm_head, gpu.lm_head);
  return plan.Take();
}

}  // namespace latentd
