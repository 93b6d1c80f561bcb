#ifndef LATENTD_ENGINE_CUDA_MLA_PREFILL_H_
#define LATENTD_ENGINE_CUDA_MLA_PREFILL_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace latentd {

class Cublas;  // engine/cuda/cublas.h

// A sequence with a chunk of a prompt in this step.
struct MlaPrefillSequence {
  int32_t num_queries = 0;  // tokens of this step
  int32_t num_keys =
      0;  // with those before them; query i sees keys [0, num_keys - num_queries + i]
  int32_t block_begin = 0;  // of its table in `blocks`
};

// Non-absorbed MLA for long chunks: latents are expanded to keys and values of each head (192 and
// 128 dims), a bounded number of tokens at a time; the parts of a long context are merged by their
// log-sum-exp. Not thread-safe; not for graphs.
class MlaPrefill {
 public:
  struct Options {
    int num_heads = 0;
    int32_t max_queries = 0;  // of a step
    int32_t max_sequences = 0;
    int32_t expand_tokens = 0;  // keys expanded at a time; >= max_queries
  };
  static absl::StatusOr<std::unique_ptr<MlaPrefill>> Create(const Options& options, Cublas* cublas);
  virtual ~MlaPrefill() = default;

  static size_t WorkspaceBytes(const Options& options);

  // Once a step, before its layers: the sequences in the order of their queries in q. Host work and
  // copies.
  virtual absl::Status Plan(absl::Span<const MlaPrefillSequence> sequences, const int32_t* blocks,
                            std::byte* workspace, cudaStream_t stream) = 0;

  struct Layer {
    const __nv_bfloat16* q =
        nullptr;  // [num_queries, num_heads, 192], the rope dims (last 64) rotated
    const __nv_bfloat16* cache =
        nullptr;  // [num_blocks, 64, 576]; the chunk's own rows are in it already
    const __nv_bfloat16* w_uk = nullptr;  // [num_heads, 128, 512]
    const __nv_bfloat16* w_uv = nullptr;  // [num_heads, 128, 512]
    float softmax_scale = 0;
    __nv_bfloat16* out = nullptr;  // [num_queries, num_heads, 128]
  };
  virtual absl::Status Run(const Layer& layer, cudaStream_t stream) = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_MLA_PREFILL_H_
