#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/cuda/kernels/mla_cache.h"

namespace latentd {

// Absorbed MLA over the paged latent cache, for sequences with one or a few queries: decode,
// speculation, short chunks. The key of a token is its whole cache row (512 latents, 64 rotated
// dims), its value the 512 latents.

struct MlaSequence {
  int32_t num_queries = 0;  // >= 1 tokens of this step; their own keys are in the cache already
  // Tokens in the cache with them; query i sees keys [0, num_keys - num_queries + i]. 0 for a
  // sequence that only pads a graph: nothing of it is read or written.
  int32_t num_keys = 0;
};

// How a step's work is spread over the GPU: made on the host once a step, used by all layers. A
// flat array of i32 to be copied to the device.
class MlaDecodePlanner {
 public:
  struct Options {
    int num_heads = 0;
    int num_sms = 0;
    int32_t max_sequences = 0;
    int32_t max_queries = 0;  // of all sequences of a step together
    // Split boundaries depend on a sequence's own length alone, and so do the results, bit for bit.
    // Costs speed (engine/cuda/README.md says how much); otherwise the splits fill the GPU.
    bool batch_invariant = false;
  };
  explicit MlaDecodePlanner(const Options& options);

  size_t plan_capacity() const;    // i32 of the largest plan
  size_t workspace_bytes() const;  // partial results of the largest plan

  // Sequences in the order of their queries in q. `plan` gets at most plan_capacity() words. In a
  // captured graph the launch is the same for every plan.
  void Plan(absl::Span<const MlaSequence> sequences, std::vector<int32_t>* plan) const;

 private:
  Options options_;
};

struct MlaDecodeArgs {
  const __nv_bfloat16* q = nullptr;  // [num_queries, num_heads, 576], rope applied, not scaled
  MlaCache cache;                    // of this layer
  const int32_t* blocks = nullptr;   // [sum of blocks] tables of the sequences, one after the other
  const int32_t* block_begin = nullptr;  // [num_sequences] where each one's begins
  const int32_t* plan = nullptr;         // on the device
  // Zeroed before the first launch; a launch leaves its counters zero. One launch at a time.
  std::byte* workspace = nullptr;
  int num_heads = 0;
  float softmax_scale = 0;  // > 0
  __nv_bfloat16* out =
      nullptr;  // [num_queries, num_heads, 512]; rows of no sequence are left alone
};

// cudaErrorInvalidValue for a null pointer or a number out of its range, cudaErrorNotSupported when
// the driver knows no tensor maps.
cudaError_t MlaDecode(const MlaDecodeArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_H_
