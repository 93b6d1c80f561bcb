#ifndef LATENTD_ENGINE_CUDA_MLA_PREFILL_H_
#define LATENTD_ENGINE_CUDA_MLA_PREFILL_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/cuda/kernels/mla_cache.h"

namespace latentd {

class Cublas;  // engine/cuda/cublas.h

// A sequence with a chunk of a prompt in this step.
struct MlaPrefillSequence {
  int32_t num_queries = 0;  // >= 1 tokens of this step
  // With those before them; query i sees keys [0, num_keys - num_queries + i].
  int32_t num_keys = 0;
  int32_t block_begin = 0;  // of its table in `blocks`
};

// Whether absorbed attention (MlaDecode) computes less than MlaPrefill does. A query and a key of
// one head cost it 2 (576 + 512) FLOPs instead of 2 (192 + 128); but it moves each query into
// latent space and back where MlaPrefill expands each key, at 2 * 2 * 128 * 512 FLOPs a head both.
// With a long context the absorbed form is cheaper up to 170 queries, without any never.
constexpr bool PreferAbsorbed(int64_t num_queries, int64_t num_keys) {
  const int64_t pairs =
      num_queries * (num_keys - num_queries) + num_queries * (num_queries + 1) / 2;
  return pairs * 2 * (576 + 512 - 192 - 128) < (num_keys - num_queries) * 4 * 128 * 512;
}

// Non-absorbed MLA for long chunks: latents are expanded to keys and values of each head (192 and
// 128 dims), a bounded number of tokens at a time; the parts of a long context are merged by their
// log-sum-exp, each merge rounding the result to bf16. A query's result depends on its own sequence
// and the options alone, bit for bit. Not thread-safe; not for graphs.
class MlaPrefill {
 public:
  struct Options {
    int num_heads = 0;          // >= 1
    int32_t max_queries = 0;    // of a step, >= 1
    int32_t max_sequences = 0;  // >= 1
    // Keys expanded at a time, from max_queries to 2^20; rounded up to a multiple of 128. Each
    // sequence of a step takes a multiple of 128.
    int32_t expand_tokens = 0;
  };
  // For the current device. INVALID_ARGUMENT for options out of range. `cublas` outlives it.
  static absl::StatusOr<std::unique_ptr<MlaPrefill>> Create(const Options& options, Cublas* cublas);
  virtual ~MlaPrefill() = default;

  // About expand_tokens * num_heads * 640 + max_queries * num_heads * 264 bytes.
  static size_t WorkspaceBytes(const Options& options);

  // Once a step, before its layers: the sequences in the order of their queries in q. Host work and
  // copies: it waits for the copies of the last Plan(). `blocks`, the block tables of the
  // sequences, and `workspace`, WorkspaceBytes() aligned to 256, lie on the device and are used by
  // Run() until the next Plan(). INVALID_ARGUMENT, naming the sequence, for what exceeds the
  // options.
  virtual absl::Status Plan(absl::Span<const MlaPrefillSequence> sequences, const int32_t* blocks,
                            std::byte* workspace, cudaStream_t stream) = 0;

  struct Layer {
    // [num_queries, q_stride]: heads of 192, their rope dims (last 64) rotated
    const __nv_bfloat16* q = nullptr;
    int64_t q_stride = 0;                 // a multiple of 8; 0: num_heads * 192
    MlaCache cache;                       // the chunk's own rows are in it already
    const __nv_bfloat16* w_uk = nullptr;  // [num_heads, 128, 512]
    const __nv_bfloat16* w_uv = nullptr;  // [num_heads, 128, 512]
    float softmax_scale = 0;
    __nv_bfloat16* out = nullptr;  // [num_queries, num_heads, 128]
  };
  // Of the sequences of the last Plan(). Does not synchronise.
  virtual absl::Status Run(const Layer& layer, cudaStream_t stream) = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_MLA_PREFILL_H_
