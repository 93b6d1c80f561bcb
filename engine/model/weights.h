#ifndef LATENTD_ENGINE_MODEL_WEIGHTS_H_
#define LATENTD_ENGINE_MODEL_WEIGHTS_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/safetensors.h"

namespace latentd {

// y = x W^T + b as it is stored. Views only; `scale_inv` is empty unless `weight` is FP8, `bias`
// unless config.attention_bias gives this projection one.
struct LinearWeight {
  TensorView weight;     // [out_features, in_features] f8e4m3, bf16 or f32
  TensorView scale_inv;  // [ceil(out_features / block_rows), ceil(in_features / block_cols)] f32
  TensorView bias;       // [out_features] bf16 or f32
};

struct MlpWeights {
  LinearWeight gate_proj;  // [width, hidden_size]
  LinearWeight up_proj;    // [width, hidden_size]
  LinearWeight down_proj;  // [hidden_size, width]
};

struct MoeWeights {
  TensorView gate;                     // [n_routed_experts, hidden_size] bf16 or f32
  TensorView e_score_correction_bias;  // [n_routed_experts] f32 (bf16 in some copies)
  // [n_routed_experts], width moe_intermediate_size; those of other ranks are empty
  std::vector<MlpWeights> experts;
  MlpWeights shared_experts;  // width n_shared_experts * moe_intermediate_size
};

struct LayerWeights {
  TensorView input_layernorm;       // [hidden_size]
  LinearWeight q_proj;              // without q_lora_rank: [num_heads * qk_head_dim, hidden_size]
  LinearWeight q_a_proj;            // [q_lora_rank, hidden_size]
  TensorView q_a_layernorm;         // [q_lora_rank]
  LinearWeight q_b_proj;            // [num_heads * qk_head_dim, q_lora_rank]
  LinearWeight kv_a_proj_with_mqa;  // [kv_lora_rank + qk_rope_head_dim, hidden_size]
  TensorView kv_a_layernorm;        // [kv_lora_rank]
  LinearWeight kv_b_proj;           // [num_heads * (qk_nope_head_dim + v_head_dim), kv_lora_rank]
  LinearWeight o_proj;              // [hidden_size, num_heads * v_head_dim]
  TensorView post_attention_layernorm;  // [hidden_size]
  MlpWeights mlp;                       // dense layers
  MoeWeights moe;                       // the others
};

// Where the weights of a model lie. Copying shares the memory behind it.
struct ModelWeights {
  TensorView embed_tokens;           // [vocab_size, hidden_size]
  std::vector<LayerWeights> layers;  // [num_hidden_layers]
  TensorView norm;                   // [hidden_size]
  TensorView lm_head;  // [vocab_size, hidden_size]; embed_tokens' view when they are tied

  std::shared_ptr<const void> storage;  // keeps the memory of all views
};

enum class LoadFormat {
  kSafetensors,
  kDummy,  // random weights of the config's shapes: any config.json can be served and benchmarked
};

// Called now and then while loading, from one thread; done == total once, at the end.
using LoadProgress = std::function<void(uint64_t done_bytes, uint64_t total_bytes)>;

// Finds and checks every tensor of the model in `dir`. Missing, surplus (outside the MTP layers),
// wrongly shaped or typed tensors are refused by name, all of them at once up to a limit. The
// mapped pages are read ahead, so that the first step does not wait for the disk; that is the
// progress. Of the routed experts only those of `placement` are read, or made, and have views; the
// tensors of the others are checked all the same.
absl::StatusOr<ModelWeights> LoadWeights(const ModelConfig& config,
                                         const std::filesystem::path& dir, LoadFormat format,
                                         const LoadProgress& progress,
                                         const Placement& placement = {});

// The same checks of a checkpoint, and its files mapped; no weight is read: for who reads each one
// once, by Checkpoint::Read().
struct MappedWeights {
  std::shared_ptr<const Checkpoint> checkpoint;
  ModelWeights weights;  // views of it
};
absl::StatusOr<MappedWeights> MapWeights(const ModelConfig& config,
                                         const std::filesystem::path& dir,
                                         const Placement& placement = {});

// What LoadWeights would refuse of a checkpoint, found from its headers: no weight is read.
absl::Status CheckWeights(const ModelConfig& config, const std::filesystem::path& dir);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_WEIGHTS_H_
