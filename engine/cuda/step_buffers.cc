#include "engine/cuda/step_buffers.h"

#include <algorithm>
#include <limits>

#include "engine/cuda/cuda_engine.h"
#include "engine/cuda/engine_limits.h"
#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/sampler.h"
#include "engine/step.h"

namespace latentd {
namespace {

// Absorbed rows of a step take 270 KB each with DeepSeek-V3's 128 heads; all sequences with one
// token and some short chunks find room.
constexpr int32_t kAbsorbedRows = 512;
// The experts' rows of a long step are its largest buffers: 250 KB a token with DeepSeek-V3's dims
// and nine experts. Fewer tokens at a time leave more rows of tiles empty: 4,096 cost 2 %.
constexpr int32_t kPieceTokens = 8192;

int32_t RoundUp(int64_t value, int32_t multiple) {
  return static_cast<int32_t>((value + multiple - 1) / multiple * multiple);
}

Fp8Rows TakeFp8(Carver& carver, int64_t rows, int64_t columns) {
  Fp8Rows out;
  out.data = carver.Take<__nv_fp8_e4m3>(rows * columns);
  out.scales = carver.Take<float>(columns / kQuantGroup * rows);
  out.scale_stride = rows;
  return out;
}

LinearInput TakeInput(Carver& carver, bool fp8, int64_t rows, int64_t columns) {
  LinearInput out;
  if (fp8) {
    out.fp8 = TakeFp8(carver, rows, columns);
  } else {
    out.bf16 = carver.Take<__nv_bfloat16>(rows * columns);
  }
  return out;
}

void CarveAttention(const ModelConfig& config, const StepLimits& limits, Carver& carver,
                    StepBuffers& b) {
  const bool fp8 = config.quantization.has_value();
  const int64_t rows = limits.max_tokens, heads = config.num_attention_heads;
  const int64_t q_dim = heads * config.qk_head_dim(), v_dim = heads * config.v_head_dim;
  const int64_t q_a_dim = config.q_lora_rank.value_or(q_dim);
  b.qkv_a = carver.Take<__nv_bfloat16>(rows * (q_a_dim + config.latent_dim()));
  if (config.q_lora_rank) {
    b.q_a = TakeInput(carver, fp8, rows, *config.q_lora_rank);
    b.q_b = carver.Take<__nv_bfloat16>(rows * q_dim);
  }
  b.attention_out = TakeInput(carver, fp8, rows, v_dim);

  const int64_t absorbed = limits.max_absorbed;
  b.latent_q = carver.Take<__nv_bfloat16>(absorbed * heads * config.latent_dim());
  b.latent_out = carver.Take<__nv_bfloat16>(absorbed * heads * config.kv_lora_rank);
  if (fp8) b.prefill_out = carver.Take<__nv_bfloat16>(rows * v_dim);
}

void CarveMlp(const ModelConfig& config, const StepLimits& limits, Carver& carver, StepBuffers& b) {
  const bool fp8 = config.quantization.has_value();
  const bool moe = config.first_k_dense_replace < config.num_hidden_layers;
  const bool dense = config.first_k_dense_replace > 0;
  const int64_t tokens = limits.piece_tokens;
  const int64_t choices = moe ? config.num_experts_per_tok + config.n_shared_experts : 0;
  const int64_t expert_rows = moe ? MaxExpertRows(config, limits.world_size, tokens) : 0;
  // Elements of the widest MLP's activations.
  const int64_t dense_elements = dense ? tokens * config.intermediate_size : 0;
  const int64_t elements = std::max(dense_elements, expert_rows * config.moe_intermediate_size);
  b.activation = carver.Take<__nv_bfloat16>(elements);
  if (fp8) {
    b.activation_in.fp8.data = carver.Take<__nv_fp8_e4m3>(elements);
    b.activation_in.fp8.scales = carver.Take<float>(elements / kQuantGroup);
    b.activation_in.fp8.scale_stride = tokens;
  } else {
    b.activation_in.bf16 = b.activation;
  }
  if (!moe) return;
  const int64_t all_tokens = tokens * limits.world_size;  // of all ranks
  b.routing.num_choices = static_cast<int>(choices);
  b.routing.row_of = carver.Take<int32_t>(all_tokens * choices);
  b.routing.weights = carver.Take<float>(all_tokens * choices);
  b.routing.topk_ids = carver.Take<int32_t>(tokens * config.num_experts_per_tok);
  b.routing.token_of_row = carver.Take<int32_t>(expert_rows);
  b.routing.group_offsets =
      carver.Take<int32_t>(config.n_routed_experts + config.n_shared_experts + 1);
  b.gathered = TakeInput(carver, fp8, expert_rows, config.hidden_size);
  b.expert_out = carver.Take<__nv_bfloat16>(expert_rows * config.hidden_size);
  if (!limits.in_group) return;
  b.slots = carver.Take<std::byte>(limits.world_size * SlotBytes(config, limits.piece_tokens));
  b.expert_sums = carver.Take<__nv_bfloat16>(all_tokens * config.hidden_size);
}

// Tokens of a piece. In a group they are fewer the more ranks send as many: all of them may want
// this rank's experts, and what is computed together has no more rows than a rank has alone.
int32_t PieceTokens(const ModelConfig& config, const StepLimits& limits) {
  int64_t tokens = std::min(limits.max_tokens, kPieceTokens);
  if (!limits.in_group) return static_cast<int32_t>(tokens);
  const int64_t most =
      int64_t{kPieceTokens} * (config.num_experts_per_tok + config.n_shared_experts);
  const int64_t fit = most / std::max<int64_t>(1, MaxExpertRows(config, limits.world_size, 1));
  return static_cast<int32_t>(
      std::min(tokens, std::max<int64_t>(kRowTile, fit / kRowTile * kRowTile)));
}

}  // namespace

// Each token takes an expert at most once, so of a rank with few experts not more than it has.
int64_t MaxExpertRows(const ModelConfig& config, int32_t world_size, int64_t tokens) {
  const int32_t most_experts = LocalExperts(config.n_routed_experts, 0, world_size).count;
  const int64_t routed = std::min(config.num_experts_per_tok, most_experts);
  return tokens * (world_size * routed + config.n_shared_experts);
}

TokenSlot CarveSlot(const ModelConfig& config, int32_t rows, Carver& carver) {
  const int64_t stride = RoundUp(rows, 4);  // of scales
  const size_t choices = size_t(rows) * size_t(config.num_experts_per_tok);
  TokenSlot slot;
  slot.x = TakeInput(carver, config.quantization.has_value(), stride, config.hidden_size);
  slot.topk_ids = carver.Take<int32_t>(choices);
  slot.weights = carver.Take<float>(choices);
  return slot;
}

size_t SlotBytes(const ModelConfig& config, int32_t rows) {
  Carver counter(nullptr);
  CarveSlot(config, rows, counter);
  return counter.used();
}

StepLimits MakeStepLimits(const ModelConfig& config, const CudaEngineOptions& options,
                          int32_t max_model_len) {
  StepLimits limits;
  limits.max_tokens = RoundUp(options.max_step_tokens, kRowTile);
  limits.max_sequences = options.max_sequences;
  limits.max_absorbed = std::min(limits.max_tokens,
                                 RoundUp(std::max(options.max_sequences, kAbsorbedRows), kRowTile));
  limits.world_size = PlacementOf(options).world_size;
  limits.in_group = options.placement.has_value();
  limits.piece_tokens = PieceTokens(config, limits);
  const int64_t table = (int64_t{max_model_len} + kBlockSize - 1) / kBlockSize;
  limits.max_blocks = static_cast<int32_t>(
      std::min<int64_t>(table * options.max_sequences, std::numeric_limits<int32_t>::max() / 8));
  limits.max_suppressed = std::max(config.vocab_size, 256 * options.max_sequences);
  limits.batch_invariant = options.batch_invariant;
  return limits;
}

MlaDecodePlanner::Options DecodePlannerOptions(const ModelConfig& config, const StepLimits& limits,
                                               int num_sms) {
  return {.num_heads = config.num_attention_heads,
          .num_sms = num_sms,
          .max_sequences = limits.max_sequences,
          .max_queries = limits.max_absorbed,
          .batch_invariant = limits.batch_invariant};
}

MlaPrefill::Options PrefillOptions(const ModelConfig& config, const StepLimits& limits) {
  return {.num_heads = config.num_attention_heads,
          .max_queries = limits.max_tokens,
          .max_sequences = limits.max_sequences,
          .expand_tokens = limits.max_tokens};
}

StepBuffers CarveStepBuffers(const ModelConfig& config, const StepLimits& limits, int num_sms,
                             Carver& carver) {
  const bool fp8 = config.quantization.has_value();
  const bool moe = config.first_k_dense_replace < config.num_hidden_layers;
  const int64_t rows = limits.max_tokens, hidden = config.hidden_size;
  StepBuffers b;
  b.residual = carver.Take<float>(rows * hidden);
  if (fp8) b.x.fp8 = TakeFp8(carver, rows, hidden);
  if (!fp8 || moe) b.x.bf16 = carver.Take<__nv_bfloat16>(rows * hidden);
  b.delta = carver.Take<__nv_bfloat16>(rows * hidden);
  const int32_t samples = RoundUp(limits.max_sequences, kLogitRows);
  b.last = carver.Take<__nv_bfloat16>(samples * hidden);
  b.logits = carver.Take<float>(int64_t{kLogitRows} * config.vocab_size);
  b.sampler_workspace =
      carver.Take<std::byte>(SamplerWorkspaceBytes(kLogitRows, config.vocab_size));
  if (moe) {
    b.router_workspace =
        carver.Take<std::byte>(RouterWorkspaceBytes(limits.piece_tokens, config.n_routed_experts));
  }
  b.gemm_workspace = carver.Take<std::byte>(Fp8GemmWorkspaceBytes());
  b.decode_workspace = carver.Take<std::byte>(
      MlaDecodePlanner(DecodePlannerOptions(config, limits, num_sms)).workspace_bytes());
  b.prefill_workspace =
      carver.Take<std::byte>(MlaPrefill::WorkspaceBytes(PrefillOptions(config, limits)));

  // A layer's attention and its MLP are never under way together, and leave nothing behind for one
  // another but x, delta and, across the next norm, expert_out.
  StepBuffers counted;
  Carver attention_size(nullptr), mlp_size(nullptr);
  CarveAttention(config, limits, attention_size, counted);
  CarveMlp(config, limits, mlp_size, counted);
  std::byte* shared = carver.Take<std::byte>(std::max(attention_size.used(), mlp_size.used()));
  Carver attention(shared), mlp(shared);
  CarveAttention(config, limits, attention, b);
  CarveMlp(config, limits, mlp, b);
  return b;
}

}  // namespace latentd
