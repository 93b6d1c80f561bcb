#include "engine/cuda/forward.h"

#include <algorithm>
#include <cmath>

#include "engine/cuda/cuda_status.h"
#include "engine/cuda/group_experts.h"
#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/mla_decode.h"
#include "engine/cuda/kernels/mla_projection.h"
#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/norm.h"
#include "engine/cuda/kernels/sampler.h"
#include "engine/status.h"

namespace latentd {
namespace {

using namespace kernel_family;  // NOLINT(google-build-using-namespace)

// Up to so many rows a linear layer is the speed of its weights' bytes, where Fp8Gemm is ahead of
// cuBLASLt.
constexpr int kFp8GemmRows = 128;
// From so many rows a group on Fp8GemmManyRows is ahead. Its sums have another order.
constexpr int kManyRowsOfGroup = 128;
// batch_invariant: the head is computed for so many rows at a time, always.
constexpr int kInvariantLogitRows = 64;

int64_t WholeTiles(int64_t rows) { return (rows + kRowTile - 1) / kRowTile * kRowTile; }

// The buffers with the scales of a shape's rows close together, as cuBLASLt wants them.
StepBuffers Packed(const CudaForward::Parts& parts, const StepShape& shape) {
  StepBuffers buffers = *parts.buffers;
  for (LinearInput* input : {&buffers.x, &buffers.q_a, &buffers.attention_out})
    input->fp8.scale_stride = WholeTiles(shape.rows);
  buffers.gathered.fp8.scale_stride = WholeTiles(
      MaxExpertRows(*parts.config, parts.group.placement.world_size, shape.piece_tokens));
  return buffers;
}

// One Run().
class Pass {
 public:
  Pass(const CudaForward::Parts& parts, float softmax_scale, const StepShape& shape,
       const StepArrays& input, const CudaForward::Watch& watch, cudaStream_t stream)
      : config_(*parts.config),
        weights_(*parts.weights),
        buffers_(Packed(parts, shape)),
        parts_(parts),
        softmax_scale_(softmax_scale),
        power_of_two_scales_(config_.quantization && config_.quantization->power_of_two_scales),
        shape_(shape),
        input_(input),
        watch_(watch),
        stream_(stream) {}

  absl::Status Run(const CudaForward::Layers& layers, int32_t* sampled);

 private:
  // Tokens [begin, begin + rows), whose MLPs are computed together. In a group all ranks send
  // exchange_rows, of which `rows` are this rank's and the others padding.
  struct Piece {
    int index = 0;
    int begin = 0;
    int rows = 0;
    int exchange_rows = 0;
  };

  // Rows times one matrix, or a group of them, by our own kernels.
  struct Product {
    const WeightMatrix* weight = nullptr;
    LinearInput x;
    int rows = 0;
    const int32_t* group_offsets = nullptr;
    int rows_per_group = 0;  // about; 0: as many as there is room for
    bool swiglu = false;
    __nv_bfloat16* out = nullptr;
    std::string_view family;
  };

  absl::Status Embed();
  absl::Status Attend(int layer);
  absl::Status ProjectQueriesAndKeys(int layer);
  absl::Status AttendAbsorbed(int layer);
  absl::Status AttendExpanded(int layer);
  absl::Status NormBeforeMlp(int layer, const Piece& piece);
  absl::Status RunMlp(int layer, const Piece& piece);
  absl::Status RunDense(const GpuLayer& layer, const Piece& piece);
  absl::Status RunExperts(int layer, const Piece& piece);
  absl::Status RunGroupExperts(int layer, const Piece& piece);
  absl::Status Route(int layer, const Piece& piece, const LinearInput& x, MoeRouting routing);
  absl::Status ComputeExperts(const GpuLayer& layer, int rows, int rows_per_expert);
  absl::Status RunGrouped(const Product& product);
  absl::Status Quantize(int columns, int rows, const int32_t* rows_device, const LinearInput& out,
                        std::string_view family);
  absl::Status NormAfterMlp(int layer, const Piece& piece);
  absl::Status TraceLastLayer(const Piece& piece);
  absl::Status Sample(int32_t* sampled);
  absl::Status Logits(int begin, int rows);

  absl::Status Linear(const LinearInput& x, int rows, const WeightMatrix& weight,
                      __nv_bfloat16* out, std::string_view family);
  AddNormArgs Norm(const float* weight, const Piece& piece) const;
  void AddMlp(int layer, const Piece& piece, AddNormArgs& args) const;

  // Every launch ends here.
  absl::Status Done(absl::Status status, std::string_view family) {
    if (!status.ok() || watch_.timer == nullptr) return status;
    return watch_.timer->Done(family, stream_);
  }
  absl::Status Done(cudaError_t error, const char* call, std::string_view family) {
    return Done(CudaStatus(error, call), family);
  }

  __nv_bfloat16* q() const { return config_.q_lora_rank ? buffers_.q_b : buffers_.qkv_a; }
  int q_columns() const { return config_.num_attention_heads * config_.qk_head_dim(); }
  int64_t q_stride() const {
    return config_.q_lora_rank ? q_columns() : q_columns() + config_.latent_dim();
  }
  int attention_columns() const { return config_.num_attention_heads * config_.v_head_dim; }
  MlaCache cache(int layer) const {
    const MlaCache& first = parts_.cache;
    const int64_t layer_bytes = parts_.num_blocks * MlaCacheBlockBytes(first.format);
    return {first.data + layer * layer_bytes, first.format};
  }
  GroupExperts Group(const Piece& piece) const {
    return GroupExperts(config_, buffers_, parts_.group, piece.exchange_rows, stream_);
  }
  bool in_group(int layer) const {
    return parts_.group.exchange != nullptr && config_.is_moe_layer(layer);
  }
  bool is_last(int layer) const { return layer + 1 == config_.num_hidden_layers; }
  bool fp8() const { return config_.quantization.has_value(); }

  const ModelConfig& config_;
  const GpuWeights& weights_;
  const StepBuffers buffers_;
  const CudaForward::Parts& parts_;
  const float softmax_scale_;
  const bool power_of_two_scales_;
  const StepShape& shape_;
  const StepArrays& input_;
  const CudaForward::Watch& watch_;
  const cudaStream_t stream_;
};

absl::Status Pass::Run(const CudaForward::Layers& layers, int32_t* sampled) {
  if (watch_.timer != nullptr) RETURN_IF_ERROR(watch_.timer->Begin(stream_));
  if (layers.begin == 0) RETURN_IF_ERROR(Embed());
  for (int layer = layers.begin; layer < layers.end; ++layer) {
    if (shape_.rows > 0) RETURN_IF_ERROR(Attend(layer));
    if (!in_group(layer)) RETURN_IF_ERROR(NormBeforeMlp(layer, {0, 0, shape_.rows}));
    for (int i = 0; i < shape_.pieces(); ++i) {
      const int begin = i * shape_.piece_tokens;
      const Piece piece{i, begin, std::clamp(shape_.rows - begin, 0, shape_.piece_tokens),
                        std::min(shape_.piece_tokens, shape_.exchange_rows - begin)};
      if (in_group(layer)) RETURN_IF_ERROR(NormBeforeMlp(layer, piece));
      RETURN_IF_ERROR(RunMlp(layer, piece));
      RETURN_IF_ERROR(NormAfterMlp(layer, piece));
    }
    if (watch_.trace != nullptr)
      RETURN_IF_ERROR(watch_.trace->AfterMlp(layer, buffers_.residual, config_.hidden_size));
  }
  return layers.end == config_.num_hidden_layers ? Sample(sampled) : absl::OkStatus();
}

// ---- norms
// ---------------------------------------------------------------------------------------

// RMSNorm of a piece's tokens into x; nothing is added yet.
AddNormArgs Pass::Norm(const float* weight, const Piece& piece) const {
  AddNormArgs args;
  args.num_rows = piece.rows;
  args.hidden_size = config_.hidden_size;
  args.eps = config_.rms_norm_eps;
  args.weight = weight;
  args.residual = buffers_.residual + int64_t{piece.begin} * config_.hidden_size;
  args.out = RowsFrom(buffers_.x, piece.begin, config_.hidden_size);
  args.power_of_two_scales = power_of_two_scales_;
  return args;
}

absl::Status Pass::Embed() {
  AddNormArgs args = Norm(weights_.layers[0].input_layernorm, {0, 0, shape_.rows});
  args.tokens = input_.tokens;
  args.embed = weights_.embed_tokens;
  if (fp8()) args.out.bf16 = nullptr;  // that is the router's
  RETURN_IF_ERROR(Done(AddNorm(args, stream_), "AddNorm", kNorm));
  if (watch_.trace == nullptr) return absl::OkStatus();
  return watch_.trace->Embedding(buffers_.residual, config_.hidden_size);
}

absl::Status Pass::NormBeforeMlp(int layer, const Piece& piece) {
  AddNormArgs args = Norm(weights_.layers[layer].post_attention_layernorm, piece);
  args.delta = buffers_.delta + int64_t{piece.begin} * config_.hidden_size;
  if (fp8() && !config_.is_moe_layer(layer)) args.out.bf16 = nullptr;
  if (in_group(layer)) {
    const LinearInput own = Group(piece).own().x;
    if (fp8()) args.out.fp8 = own.fp8;
    if (!fp8()) args.out.bf16 = own.bf16;
  }
  RETURN_IF_ERROR(Done(AddNorm(args, stream_), "AddNorm", kNorm));
  if (watch_.trace == nullptr) return absl::OkStatus();
  return watch_.trace->BeforeMlp(buffers_.residual, config_.hidden_size, piece.begin, piece.rows);
}

void Pass::AddMlp(int layer, const Piece& piece, AddNormArgs& args) const {
  if (config_.is_moe_layer(layer) && !in_group(layer)) {
    args.expert_out = buffers_.expert_out;
    args.routing = buffers_.routing;
  } else {
    args.delta = buffers_.delta + int64_t{piece.begin} * config_.hidden_size;
  }
}

// Adds the MLP's result and normalises for what comes next: the next layer, or the head, which
// reads only the tokens that are sampled.
absl::Status Pass::NormAfterMlp(int layer, const Piece& piece) {
  if (!is_last(layer)) {
    AddNormArgs args = Norm(weights_.layers[layer + 1].input_layernorm, piece);
    AddMlp(layer, piece, args);
    if (fp8()) args.out.bf16 = nullptr;
    return Done(AddNorm(args, stream_), "AddNorm", kNorm);
  }
  AddNormArgs args = Norm(weights_.norm, piece);
  if (watch_.trace == nullptr) {
    AddMlp(layer, piece, args);
  } else {
    RETURN_IF_ERROR(TraceLastLayer(piece));
  }
  const int first = shape_.piece_samples[piece.index];
  args.num_rows = shape_.piece_samples[piece.index + 1] - first;
  if (args.num_rows == 0) return absl::OkStatus();
  args.rows = input_.sample_rows + first;
  args.out = {};
  args.out.bf16 = buffers_.last + int64_t{first} * config_.hidden_size;
  return Done(AddNorm(args, stream_), "AddNorm", kNorm);
}

// A trace shows the residual of all tokens.
absl::Status Pass::TraceLastLayer(const Piece& piece) {
  AddNormArgs args = Norm(weights_.norm, piece);
  AddMlp(config_.num_hidden_layers - 1, piece, args);
  return Done(AddNorm(args, stream_), "AddNorm", kNorm);
}

// ---- attention
// -----------------------------------------------------------------------------------

absl::Status Pass::Attend(int layer) {
  RETURN_IF_ERROR(ProjectQueriesAndKeys(layer));
  if (shape_.absorbed_rows > 0) RETURN_IF_ERROR(AttendAbsorbed(layer));
  if (shape_.rows > shape_.absorbed_rows) RETURN_IF_ERROR(AttendExpanded(layer));
  RETURN_IF_ERROR(Linear(buffers_.attention_out, shape_.rows, weights_.layers[layer].o,
                         buffers_.delta, kOutput));
  if (watch_.trace == nullptr) return absl::OkStatus();
  return watch_.trace->Rows("attn_out", layer, buffers_.delta, config_.hidden_size,
                            config_.hidden_size);
}

absl::Status Pass::ProjectQueriesAndKeys(int layer) {
  const GpuLayer& w = weights_.layers[layer];
  RETURN_IF_ERROR(Linear(buffers_.x, shape_.rows, w.qkv_a, buffers_.qkv_a, kProjections));
  LatentArgs args;
  args.num_tokens = shape_.rows;
  args.qkv_a = buffers_.qkv_a;
  args.q_dim = config_.q_lora_rank.value_or(q_columns());
  args.q_a_layernorm = w.q_a_layernorm;
  args.kv_a_layernorm = w.kv_a_layernorm;
  args.eps = kLatentNormEps;
  args.rope = weights_.rope;
  args.positions = input_.positions;
  args.slots = input_.slots;
  args.cache = cache(layer);
  args.power_of_two_scales = power_of_two_scales_;
  args.q_out = buffers_.q_a;
  RETURN_IF_ERROR(Done(NormLatents(args, stream_), "NormLatents", kNorm));
  if (config_.q_lora_rank)
    RETURN_IF_ERROR(Linear(buffers_.q_a, shape_.rows, w.q_b, buffers_.q_b, kProjections));
  if (watch_.trace == nullptr) return absl::OkStatus();
  RETURN_IF_ERROR(watch_.trace->Rows("q", layer, q(), q_columns(), q_stride()));
  return watch_.trace->Cache(layer, cache(layer));
}

absl::Status Pass::AttendAbsorbed(int layer) {
  const GpuLayer& w = weights_.layers[layer];
  AbsorbQueryArgs absorb;
  absorb.num_tokens = shape_.absorbed_rows;
  absorb.num_heads = config_.num_attention_heads;
  absorb.q = q();
  absorb.q_stride = q_stride();
  absorb.w_uk = w.w_uk;
  absorb.rope = weights_.rope;
  absorb.positions = input_.positions;
  absorb.out = buffers_.latent_q;
  RETURN_IF_ERROR(Done(AbsorbQuery(absorb, stream_), "AbsorbQuery", kAbsorption));

  MlaDecodeArgs decode;
  decode.q = buffers_.latent_q;
  decode.cache = cache(layer);
  decode.blocks = input_.ids;
  decode.block_begin = input_.block_begin;
  decode.plan = input_.decode_plan;
  decode.workspace = buffers_.decode_workspace;
  decode.num_heads = config_.num_attention_heads;
  decode.softmax_scale = softmax_scale_;
  decode.out = buffers_.latent_out;
  RETURN_IF_ERROR(Done(MlaDecode(decode, stream_), "MlaDecode", kAttention));

  ProjectValueArgs project;
  project.num_tokens = shape_.absorbed_rows;
  project.num_heads = config_.num_attention_heads;
  project.latent = buffers_.latent_out;
  project.w_uv = w.w_uv;
  project.power_of_two_scales = power_of_two_scales_;
  project.out = buffers_.attention_out;
  return Done(ProjectValue(project, stream_), "ProjectValue", kAbsorption);
}

// The rows behind the absorbed ones.
absl::Status Pass::AttendExpanded(int layer) {
  const GpuLayer& w = weights_.layers[layer];
  const int begin = shape_.absorbed_rows, rows = shape_.rows - begin;
  __nv_bfloat16* queries = q() + begin * q_stride();
  RETURN_IF_ERROR(Done(RopeQuery(queries, q_stride(), rows, config_.num_attention_heads,
                                 weights_.rope, input_.positions + begin, stream_),
                       "RopeQuery", kPrefillAttention));
  const LinearInput out = RowsFrom(buffers_.attention_out, begin, attention_columns());
  MlaPrefill::Layer args;
  args.q = queries;
  args.q_stride = q_stride();
  args.cache = cache(layer);
  args.w_uk = w.w_uk;
  args.w_uv = w.w_uv;
  args.softmax_scale = softmax_scale_;
  args.out = fp8() ? buffers_.prefill_out : out.bf16;
  RETURN_IF_ERROR(Done(parts_.prefill->Run(args, stream_), kPrefillAttention));
  if (!fp8()) return absl::OkStatus();
  return Done(QuantizeRows(buffers_.prefill_out, attention_columns(), rows, nullptr,
                           attention_columns(), power_of_two_scales_, out.fp8, stream_),
              "QuantizeRows", kPrefillAttention);
}

// ---- MLPs
// ----------------------------------------------------------------------------------------

absl::Status Pass::RunMlp(int layer, const Piece& piece) {
  if (in_group(layer)) return RunGroupExperts(layer, piece);
  if (piece.rows == 0) return absl::OkStatus();
  return config_.is_moe_layer(layer) ? RunExperts(layer, piece)
                                     : RunDense(weights_.layers[layer], piece);
}

absl::Status Pass::RunDense(const GpuLayer& layer, const Piece& piece) {
  const LinearInput x = RowsFrom(buffers_.x, piece.begin, config_.hidden_size);
  LinearInput activation = buffers_.activation_in;
  activation.fp8.scale_stride = WholeTiles(piece.rows);
  RETURN_IF_ERROR(RunGrouped({.weight = &layer.mlp.gate_up,
                              .x = x,
                              .rows = piece.rows,
                              .swiglu = true,
                              .out = buffers_.activation,
                              .family = kDense}));
  RETURN_IF_ERROR(Quantize(layer.mlp.width, piece.rows, nullptr, activation, kDense));
  return Linear(activation, piece.rows, layer.mlp.down,
                buffers_.delta + int64_t{piece.begin} * config_.hidden_size, kDense);
}

absl::Status Pass::RunExperts(int layer, const Piece& piece) {
  const LinearInput x = RowsFrom(buffers_.x, piece.begin, config_.hidden_size);
  RETURN_IF_ERROR(Route(layer, piece, x, buffers_.routing));
  const int rows = piece.rows * buffers_.routing.num_choices;
  GatherArgs gather;
  gather.routing = buffers_.routing;
  gather.num_groups = config_.n_routed_experts + config_.n_shared_experts;
  gather.max_rows = rows;
  gather.hidden_size = config_.hidden_size;
  gather.x = x;
  if (fp8()) gather.x.bf16 = nullptr;
  gather.out = buffers_.gathered;
  RETURN_IF_ERROR(Done(GatherRows(gather, stream_), "GatherRows", kRouter));
  return ComputeExperts(weights_.layers[layer], rows, /*rows_per_expert=*/0);
}

absl::Status Pass::RunGroupExperts(int layer, const Piece& piece) {
  const GroupExperts group = Group(piece);
  LinearInput x = RowsFrom(buffers_.x, piece.begin, config_.hidden_size);
  if (!fp8()) x = group.own().x;
  RETURN_IF_ERROR(Route(layer, piece, x, group.own_choices()));
  RETURN_IF_ERROR(Done(group.Dispatch(), kDispatch));
  RETURN_IF_ERROR(Done(group.RouteRows(input_.num_real_tokens + piece.index), kRouter));
  const GatherArgs gather = group.Gather();
  if (gather.num_groups > 0) {
    RETURN_IF_ERROR(Done(GatherRows(gather, stream_), "GatherRows", kRouter));
    RETURN_IF_ERROR(
        ComputeExperts(weights_.layers[layer], group.max_rows(), group.rows_per_expert()));
  }
  RETURN_IF_ERROR(Done(group.SumRows(), kCombine));
  return Done(group.Combine(buffers_.delta + int64_t{piece.begin} * config_.hidden_size), kCombine);
}

// Which experts a piece's tokens take; in a group those of its padding too.
absl::Status Pass::Route(int layer_index, const Piece& piece, const LinearInput& x,
                         MoeRouting routing) {
  const GpuLayer& layer = weights_.layers[layer_index];
  const bool alone = !in_group(layer_index);
  RouterArgs router;
  router.num_tokens = alone ? piece.rows : piece.exchange_rows;
  router.num_real_tokens = input_.num_real_tokens + piece.index;
  router.hidden_size = config_.hidden_size;
  router.x = x.bf16;
  router.gate_bf16 = layer.gate_bf16;
  router.gate_f32 = layer.gate_f32;
  router.correction_bias = layer.correction_bias;
  router.n_routed_experts = config_.n_routed_experts;
  router.n_group = config_.n_group;
  router.topk_group = config_.topk_group;
  router.num_experts_per_tok = config_.num_experts_per_tok;
  router.norm_topk_prob = config_.norm_topk_prob;
  router.routed_scaling_factor = config_.routed_scaling_factor;
  router.first_expert = 0;
  router.num_local_experts = alone ? config_.n_routed_experts : 0;
  router.num_shared = alone ? config_.n_shared_experts : 0;
  router.workspace = buffers_.router_workspace;
  router.routing = routing;
  RETURN_IF_ERROR(Done(RouteTokens(router, stream_), "RouteTokens", kRouter));
  if (watch_.trace == nullptr || piece.rows == 0) return absl::OkStatus();
  return watch_.trace->Experts(layer_index, routing, piece.begin, piece.rows,
                               config_.num_experts_per_tok);
}

// Of the gathered rows, at most `rows`.
absl::Status Pass::ComputeExperts(const GpuLayer& layer, int rows, int rows_per_expert) {
  const int groups = layer.mlp.gate_up.num_groups;
  const int32_t* offsets = buffers_.routing.group_offsets;
  LinearInput activation = buffers_.activation_in;
  activation.fp8.scale_stride = buffers_.gathered.fp8.scale_stride;
  RETURN_IF_ERROR(RunGrouped({.weight = &layer.mlp.gate_up,
                              .x = buffers_.gathered,
                              .rows = rows,
                              .group_offsets = offsets,
                              .rows_per_group = rows_per_expert,
                              .swiglu = true,
                              .out = buffers_.activation,
                              .family = kGateUp}));
  RETURN_IF_ERROR(Quantize(layer.mlp.width, rows, offsets + groups, activation, kQuantize));
  return RunGrouped({.weight = &layer.mlp.down,
                     .x = activation,
                     .rows = rows,
                     .group_offsets = offsets,
                     .rows_per_group = rows_per_expert,
                     .out = buffers_.expert_out,
                     .family = kDown});
}

absl::Status Pass::Quantize(int columns, int rows, const int32_t* rows_device,
                            const LinearInput& out, std::string_view family) {
  if (!fp8()) return absl::OkStatus();
  return Done(QuantizeRows(buffers_.activation, columns, rows, rows_device, columns,
                           power_of_two_scales_, out.fp8, stream_),
              "QuantizeRows", family);
}

absl::Status Pass::RunGrouped(const Product& p) {
  const WeightMatrix& weight = *p.weight;
  const int64_t out_stride = p.swiglu ? weight.n / 2 : weight.n;
  if (!weight.is_fp8()) {
    Bf16GemmArgs args;
    args.x = p.x.bf16;
    args.num_rows = p.rows;
    args.weight = weight;
    args.group_offsets = p.group_offsets;
    args.out = p.out;
    args.out_stride = out_stride;
    args.swiglu = p.swiglu;
    return Done(GroupedBf16Gemm(args, stream_), "GroupedBf16Gemm", p.family);
  }
  Fp8GemmArgs args;
  args.x = p.x.fp8;
  args.num_rows = p.rows;
  args.weight = weight;
  args.group_offsets = p.group_offsets;
  args.rows_per_group_hint =
      p.rows_per_group > 0 ? p.rows_per_group : std::max(1, p.rows / weight.num_groups);
  args.out = p.out;
  args.out_stride = out_stride;
  args.swiglu = p.swiglu;
  args.workspace = buffers_.gemm_workspace;
  const bool many = !parts_.batch_invariant && args.rows_per_group_hint >= kManyRowsOfGroup;
  return Done(many ? Fp8GemmManyRows(args, stream_) : Fp8Gemm(args, stream_), "Fp8Gemm", p.family);
}

// Results of cuBLASLt depend on the number of rows, by the algorithm that it chooses.
absl::Status Pass::Linear(const LinearInput& x, int rows, const WeightMatrix& weight,
                          __nv_bfloat16* out, std::string_view family) {
  const bool own = parts_.batch_invariant || (weight.is_fp8() && rows <= kFp8GemmRows);
  if (own) {
    return RunGrouped({.weight = &weight, .x = x, .rows = rows, .out = out, .family = family});
  }
  // Whole tiles: as fast, and the rows that the scales' stride stands for.
  return Done(
      parts_.cublas->Linear(x, static_cast<int>(WholeTiles(rows)), weight, out, weight.n, stream_),
      family);
}

// ---- the head
// ------------------------------------------------------------------------------------

absl::Status Pass::Sample(int32_t* sampled) {
  const int hidden = config_.hidden_size, samples = shape_.samples();
  if (samples > 0 && watch_.trace != nullptr)
    RETURN_IF_ERROR(watch_.trace->FinalHidden(buffers_.last, hidden));
  for (int begin = 0; begin < samples; begin += kLogitRows) {
    const int rows = std::min(kLogitRows, samples - begin);
    RETURN_IF_ERROR(Logits(begin, rows));
    if (watch_.trace != nullptr) {
      RETURN_IF_ERROR(watch_.trace->Logits(buffers_.logits, begin, rows, config_.vocab_size));
    }
    SampleArgs args;
    args.logits = buffers_.logits;
    args.num_rows = rows;
    args.vocab_size = config_.vocab_size;
    args.rows = input_.samples + begin;
    args.suppressed = input_.ids;
    args.workspace = buffers_.sampler_workspace;
    args.sampled = sampled + begin;
    RETURN_IF_ERROR(Done(SampleTokens(args, stream_), "SampleTokens", kSampling));
  }
  return absl::OkStatus();
}

// Of samples [begin, begin + rows).
absl::Status Pass::Logits(int begin, int rows) {
  const int step = parts_.batch_invariant ? kInvariantLogitRows : rows;
  for (int first = 0; first < rows; first += step) {
    RETURN_IF_ERROR(Done(
        parts_.cublas->LinearF32(buffers_.last + int64_t{begin + first} * config_.hidden_size, step,
                                 weights_.lm_head, config_.vocab_size, config_.hidden_size,
                                 buffers_.logits + int64_t{first} * config_.vocab_size,
                                 config_.vocab_size, stream_),
        kHead));
  }
  return absl::OkStatus();
}

}  // namespace

CudaForward::CudaForward(const Parts& parts) : parts_(parts) {
  softmax_scale_ = 1.0f / std::sqrt(static_cast<float>(parts.config->qk_head_dim()));
  if (parts.config->yarn) softmax_scale_ *= parts.config->yarn->softmax_scale();
}

absl::Status CudaForward::Run(const StepShape& shape, const StepArrays& input, const Layers& layers,
                              int32_t* sampled, const Watch& watch, cudaStream_t stream) const {
  return Pass(parts_, softmax_scale_, shape, input, watch, stream).Run(layers, sampled);
}

}  // namespace latentd
