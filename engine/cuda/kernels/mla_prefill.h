#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_PREFILL_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_PREFILL_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/kernels/mla_cache.h"

namespace latentd {

// The kernels of MlaPrefill (engine/cuda/mla_prefill.h): a bounded number of keys and values, a
// part, is expanded from the latent cache and attended; parts of one sequence are merged.

inline constexpr int kPrefillTile = 128;  // queries, and keys, of a tile of PrefillAttention

// Consecutive keys of a sequence, from the row `row_begin` of a part on.
struct PrefillKeys {
  int32_t row_begin = 0;  // a multiple of kPrefillTile
  int32_t num_keys = 0;
  int32_t block_begin = 0;  // where the sequence's table begins
  int32_t first_key = 0;    // position in the sequence
};

// Latents and rope keys of a part, out of the paged cache. Rows behind a sequence's keys, up to the
// next one's, become zeros.
struct GatherLatentsArgs {
  int num_rows = 0;  // of the part
  int num_heads = 0;
  MlaCache cache;
  const int32_t* blocks = nullptr;  // tables of the sequences
  const PrefillKeys* sequences =
      nullptr;  // [num_sequences], on the device; row_begin ascends from 0
  int num_sequences = 0;
  int32_t key_offset = 0;            // added to each first_key
  __nv_bfloat16* latents = nullptr;  // [num_rows, 512]
  __nv_bfloat16* keys = nullptr;     // [num_rows, num_heads, 192]: the last 64 dims are written
};
cudaError_t GatherLatents(const GatherLatentsArgs& args, cudaStream_t stream);

// Which tile of queries meets which keys, in the order in which each multiprocessor takes them: on
// the device. All are [num_work], but `begin` [num_sms + 1]: multiprocessor i takes [begin[i],
// begin[i + 1]).
struct PrefillWork {
  const int32_t* begin = nullptr;
  const int32_t* head = nullptr;
  const int32_t* tile = nullptr;         // of the sequence's queries
  const int32_t* query_begin = nullptr;  // row of the sequence's first query
  const int32_t* num_queries = nullptr;  // of the sequence
  const int32_t* row_begin = nullptr;    // of its first key in the part
  const int32_t* num_keys = nullptr;     // of its keys in the part
};

struct PrefillAttentionArgs {
  int num_queries = 0;  // rows of q
  // Rows of k and v. Those behind a sequence's keys, up to the next multiple of kPrefillTile, are
  // read and must be finite.
  int num_rows = 0;
  int num_heads = 0;
  // Query i of a sequence sees its keys [0, num_keys - num_queries + i], else all of them.
  bool causal = false;
  float softmax_scale = 0;
  const __nv_bfloat16* q = nullptr;  // [num_queries, q_stride]: heads of 192
  int64_t q_stride = 0;              // a multiple of 8
  const __nv_bfloat16* k = nullptr;  // [num_rows, num_heads, 192]
  const __nv_bfloat16* v = nullptr;  // [num_rows, num_heads, 128]
  PrefillWork work;
  __nv_bfloat16* out = nullptr;  // [num_queries, num_heads, 128]; rows without work are left alone
  // [num_queries, num_heads] log2 of the sum of exp(softmax_scale * score); may be nullptr
  float* lse = nullptr;
};
// One thread block for each of the device's multiprocessors.
cudaError_t PrefillAttention(const PrefillAttentionArgs& args, cudaStream_t stream);

// Attention over two disjoint sets of keys becomes attention over both, in place of the first.
struct MergeAttentionArgs {
  int64_t num_rows = 0;                  // queries * num_heads
  __nv_bfloat16* out = nullptr;          // [num_rows, 128]
  float* lse = nullptr;                  // [num_rows], as PrefillAttention writes it
  const __nv_bfloat16* other = nullptr;  // [num_rows, 128]
  const float* other_lse = nullptr;      // [num_rows]
};
cudaError_t MergeAttention(const MergeAttentionArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_PREFILL_H_
