#ifndef LATENTD_ENGINE_CUDA_STEP_BUFFERS_H_
#define LATENTD_ENGINE_CUDA_STEP_BUFFERS_H_

#include <cuda_bf16.h>

#include <cstddef>
#include <cstdint>

#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels/mla_decode.h"
#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/kernels/tensors.h"
#include "engine/cuda/mla_prefill.h"
#include "engine/model/config.h"

namespace latentd {

struct CudaEngineOptions;

// Rows of activations come in this many: libraries may compute whole tiles, rows that nobody reads
// among them.
inline constexpr int32_t kRowTile = 128;
// Rows of logits that are in memory together.
inline constexpr int32_t kLogitRows = 256;

// The sizes that the memory of a step is made for.
struct StepLimits {
  int32_t max_tokens = 0;  // rows of a step, a multiple of kRowTile
  int32_t max_sequences = 0;
  int32_t max_absorbed = 0;    // rows whose attention is absorbed
  int32_t piece_tokens = 0;    // tokens whose MLPs are computed together, a multiple of kRowTile
  int32_t max_blocks = 0;      // entries of all block tables together
  int32_t max_suppressed = 0;  // suppressed tokens of all sequences together
  bool batch_invariant = false;
  // In a group a piece has so many tokens of each rank.
  int32_t world_size = 1;
  bool in_group = false;
};
// Rows that the experts of one rank can have of `tokens` tokens of each rank. The same on all
// ranks.
int64_t MaxExpertRows(const ModelConfig& config, int32_t world_size, int64_t tokens);
// `max_model_len` is positive.
StepLimits MakeStepLimits(const ModelConfig& config, const CudaEngineOptions& options,
                          int32_t max_model_len);

MlaDecodePlanner::Options DecodePlannerOptions(const ModelConfig& config, const StepLimits& limits,
                                               int num_sms);
MlaPrefill::Options PrefillOptions(const ModelConfig& config, const StepLimits& limits);

// The activations of a step and the kernels' scratch memory, all in one allocation. Fields that
// the model does not need are nullptr. Rows up to StepLimits::max_tokens where no other number is
// given.
struct StepBuffers {
  float* residual = nullptr;       // [rows, hidden_size] f32
  LinearInput x;                   // [rows, hidden_size] after a norm
  __nv_bfloat16* delta = nullptr;  // [rows, hidden_size] what a layer's half adds
  __nv_bfloat16* qkv_a = nullptr;  // [rows, qkv_a.n]
  LinearInput q_a;                 // [rows, q_lora_rank]
  __nv_bfloat16* q_b = nullptr;    // [rows, num_heads * 192]; those of long chunks are rotated
  LinearInput attention_out;       // [rows, num_heads * 128]

  // Absorbed attention.
  __nv_bfloat16* latent_q = nullptr;      // [max_absorbed, num_heads, 576]
  __nv_bfloat16* latent_out = nullptr;    // [max_absorbed, num_heads, 512]
  std::byte* decode_workspace = nullptr;  // not shared: it may keep something between layers

  // Attention of long chunks.
  __nv_bfloat16* prefill_out = nullptr;    // [rows, num_heads * 128]; bf16 models use attention_out
  std::byte* prefill_workspace = nullptr;  // not shared: holds the step's plan

  // MLPs: of piece_tokens tokens, or of the rows that their experts have.
  MoeRouting routing;
  LinearInput gathered;                   // [expert rows, hidden_size]
  __nv_bfloat16* activation = nullptr;    // [rows, width] silu(gate) * up
  LinearInput activation_in;              // the same as the next product reads it
  __nv_bfloat16* expert_out = nullptr;    // [expert rows, hidden_size]
  std::byte* router_workspace = nullptr;  // zero between calls

  // In a group: what the ranks have sent of a piece, and what this rank's experts make of it.
  std::byte* slots = nullptr;            // [world_size, SlotBytes()]; gpu_exchange.h
  __nv_bfloat16* expert_sums = nullptr;  // [world_size, piece_tokens, hidden_size]

  std::byte* gemm_workspace = nullptr;  // zero between calls

  // The rows that are sampled.
  __nv_bfloat16* last = nullptr;  // [max_sequences, hidden_size] after the final norm
  float* logits = nullptr;        // [kLogitRows, vocab_size] f32
  std::byte* sampler_workspace = nullptr;
};

// Deals the buffers out, or counts them (device_memory.h).
StepBuffers CarveStepBuffers(const ModelConfig& config, const StepLimits& limits, int num_sms,
                             Carver& carver);

// One rank's part of what is exchanged of a piece: `rows` of its tokens, padding included, and
// where they go. All arrays have the same place in each slot.
struct TokenSlot {
  LinearInput x;                // [rows, hidden_size] after the norm
  int32_t* topk_ids = nullptr;  // [rows, num_experts_per_tok]; -1: padding
  float* weights = nullptr;     // [rows, num_experts_per_tok]
};
TokenSlot CarveSlot(const ModelConfig& config, int32_t rows, Carver& carver);
size_t SlotBytes(const ModelConfig& config, int32_t rows);

// The same buffers from row `begin` on.
inline Fp8Rows RowsFrom(Fp8Rows rows, int64_t begin, int64_t columns) {
  rows.data += begin * columns;
  rows.scales += begin;
  return rows;
}
inline LinearInput RowsFrom(LinearInput rows, int64_t begin, int64_t columns) {
  if (rows.fp8.data != nullptr) rows.fp8 = RowsFrom(rows.fp8, begin, columns);
  if (rows.bf16 != nullptr) rows.bf16 += begin * columns;
  return rows;
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_STEP_BUFFERS_H_
