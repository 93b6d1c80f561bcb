#ifndef LATENTD_ENGINE_CPU_CPU_MODEL_H_
#define LATENTD_ENGINE_CPU_CPU_MODEL_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cpu/packed_matrix.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/rope.h"
#include "engine/model/weights.h"

namespace latentd {

struct PackedMlp {
  PackedMatrix gate_up;  // [2 * width, hidden_size]: gate_proj's rows, then up_proj's
  PackedMatrix down;     // [hidden_size, width]
  int width = 0;
};

struct PackedLayer {
  std::vector<float> input_layernorm;  // [hidden_size]
  PackedMatrix q_a;                    // [q_lora_rank, hidden_size]; empty without it
  std::vector<float> q_a_layernorm;    // [q_lora_rank]
  PackedMatrix q_b;                    // [num_heads * qk_head_dim, q_lora_rank or hidden_size]
  PackedMatrix kv_a;                   // [latent_dim, hidden_size]
  std::vector<float> kv_a_layernorm;   // [kv_lora_rank]
  std::vector<PackedMatrix> w_uk;      // [num_heads] of [kv_lora_rank, qk_nope_head_dim]
  std::vector<PackedMatrix> w_uv;      // [num_heads] of [v_head_dim, kv_lora_rank]
  PackedMatrix o;                      // [hidden_size, num_heads * v_head_dim]
  std::vector<float> post_attention_layernorm;  // [hidden_size]

  PackedMlp mlp;                               // the dense MLP, or the shared experts
  PackedMatrix router;                         // [n_routed_experts, hidden_size]; MoE layers
  std::vector<float> e_score_correction_bias;  // [n_routed_experts]
  std::vector<PackedMlp> experts;              // [n_routed_experts]; empty ones are elsewhere
};

// The weights as the kernels read them. kv_b_proj appears as its two parts of each head, which the
// absorbed form multiplies to the query (W_UK) and to the attention's latent output (W_UV).
struct CpuModel {
  ModelConfig config;
  ExpertRange experts;   // those that are here
  ModelWeights weights;  // embed_tokens is read where it lies
  std::vector<PackedLayer> layers;
  std::vector<float> norm;  // [hidden_size]
  PackedMatrix lm_head;     // [vocab_size, hidden_size]
  std::unique_ptr<Rope> rope;
  Arena arena;

  // Of the routed experts, packs those of `placement` alone. INVALID_ARGUMENT when `weights` has
  // them not, RESOURCE_EXHAUSTED when the system has no memory. `num_positions`: for the RoPE
  // table. `quantize_activations`: see CpuEngineOptions.
  static absl::StatusOr<std::unique_ptr<CpuModel>> Build(const ModelConfig& config,
                                                         const ModelWeights& weights,
                                                         int32_t num_positions, ThreadPool& pool,
                                                         bool quantize_activations = false,
                                                         const Placement& placement = {});

  // Bytes that Build takes on top of the checkpoint's own pages.
  static uint64_t NumBytes(const ModelConfig& config, const ModelWeights& weights,
                           int32_t num_positions, const Placement& placement = {});
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_CPU_MODEL_H_
