#ifndef LATENTD_ENGINE_CUDA_GPU_WEIGHTS_H_
#define LATENTD_ENGINE_CUDA_GPU_WEIGHTS_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels/mla_projection.h"
#include "engine/cuda/kernels/tensors.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"

namespace latentd {

// An MLP, or the experts of a layer: groups of one shape.
struct GpuMlp {
  int width = 0;  // of one group
  // [groups, 2 * width, hidden_size]. gate_proj and up_proj interleaved by eights: row 16 s + j is
  // gate row 8 s + j, row 16 s + 8 + j is up row 8 s + j (0 <= j < 8), so that one thread of a
  // tensor core tile holds both halves of a SwiGLU. FP8: scales [groups, 2 * (width / 128),
  // stride]: gate's blocks of rows, then up's.
  WeightMatrix gate_up;
  WeightMatrix down;  // [groups, hidden_size, width]
};

struct GpuLayer {
  const float* input_layernorm = nullptr;  // [hidden_size]
  WeightMatrix qkv_a;                      // [q_lora_rank (or num_heads * 192) + 576, hidden_size]
  const float* q_a_layernorm = nullptr;    // [q_lora_rank]; nullptr without it
  WeightMatrix q_b;                        // [num_heads * 192, q_lora_rank]; n == 0 without it
  const float* kv_a_layernorm = nullptr;   // [512]
  // kv_b_proj's two parts of each head, dequantised.
  const __nv_bfloat16* w_uk = nullptr;              // [num_heads, 128, 512]
  const __nv_bfloat16* w_uv = nullptr;              // [num_heads, 128, 512]
  WeightMatrix o;                                   // [hidden_size, num_heads * 128]
  const float* post_attention_layernorm = nullptr;  // [hidden_size]

  // Dense layers: one group, width intermediate_size. The others: the rank's routed experts, then
  // n_shared_experts groups that the shared MLP is cut into, all of width moe_intermediate_size.
  GpuMlp mlp;
  const __nv_bfloat16* gate_bf16 =
      nullptr;  // router [n_routed_experts, hidden_size], one of the two; MoE layers
  const float* gate_f32 = nullptr;
  const float* correction_bias = nullptr;  // [n_routed_experts]
};

// The weights of one rank on its GPU. Constant after loading.
struct GpuWeights {
  const __nv_bfloat16* embed_tokens = nullptr;  // [vocab_size, hidden_size]
  std::vector<GpuLayer> layers;
  const float* norm = nullptr;  // [hidden_size]
  const __nv_bfloat16* lm_head =
      nullptr;     // [vocab_size, hidden_size]; embed_tokens when they are tied
  RopeTable rope;  // [max_model_len, 32]

  DeviceMemory memory;  // behind all of them
};

// UNIMPLEMENTED, by name, for a configuration that the CUDA engine does not serve: head dims other
// than DeepSeek-V3's, attention_bias, blocks of quantisation other than 128 x 128, sizes that are
// no multiple of what the kernels need.
absl::Status CheckCudaSupports(const ModelConfig& config);

// Bytes that GpuWeights::memory takes. A router that a checkpoint stores wider than config.json's
// dtype says takes its own size.
uint64_t GpuWeightBytes(const ModelConfig& config, int32_t max_model_len,
                        const Placement& placement = {});

// Copies each tensor from the checkpoint's files to the current device once, through pinned buffers
// and several threads; or makes random ones on the GPU (kDummy): those of MakeDummyWeights(), bit
// for bit. Errors of the checkpoint are those of LoadWeights(), and UNIMPLEMENTED, by name, for a
// projection that is not FP8 in an FP8 model. RESOURCE_EXHAUSTED, with the numbers, when they do
// not fit. max_model_len >= 1.
absl::StatusOr<std::unique_ptr<GpuWeights>> LoadGpuWeights(const ModelConfig& config,
                                                           const std::filesystem::path& dir,
                                                           LoadFormat format, int32_t max_model_len,
                                                           const LoadProgress& progress,
                                                           const Placement& placement = {});

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GPU_WEIGHTS_H_
