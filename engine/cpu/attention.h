#ifndef LATENTD_ENGINE_CPU_ATTENTION_H_
#define LATENTD_ENGINE_CPU_ATTENTION_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model/config.h"
#include "engine/step.h"

namespace latentd {

// The latent KV cache of all layers, paged: [num_hidden_layers, num_blocks, 64, dim] f32. A token's
// row is its kv_lora_rank latents (after kv_a_layernorm), zeros up to value_dim, its rotated rope
// part, zeros up to dim.
class LatentCache {
 public:
  // The memory is reserved; pages come with their first use.
  // `rounds_to_fp8`: what is written is to be rounded (QuantizeCacheRow).
  LatentCache(const ModelConfig& config, int32_t num_blocks, bool rounds_to_fp8 = false);
  ~LatentCache();
  LatentCache(const LatentCache&) = delete;
  LatentCache& operator=(const LatentCache&) = delete;

  bool ok() const { return data_ != nullptr; }  // false: the system has no memory
  int32_t num_blocks() const { return num_blocks_; }
  bool rounds_to_fp8() const { return rounds_to_fp8_; }
  int value_dim() const { return value_dim_; }
  int dim() const { return dim_; }
  float* block(int layer, BlockId id) {
    return data_ + (static_cast<size_t>(layer) * num_blocks_ + id) * kBlockSize * dim_;
  }
  const float* block(int layer, BlockId id) const {
    return const_cast<LatentCache*>(this)->block(layer, id);
  }
  size_t num_floats() const { return num_bytes_ / sizeof(float); }

  static int ValueDim(const ModelConfig& config);
  static int Dim(const ModelConfig& config);
  static uint64_t NumBytes(const ModelConfig& config, int32_t num_blocks);

 private:
  int32_t num_blocks_;
  bool rounds_to_fp8_;
  int value_dim_;
  int dim_;
  size_t num_bytes_;
  float* data_ = nullptr;
};

// A run of tokens of one sequence whose queries attend now. Their own keys are in the cache
// already.
struct AttentionSpan {
  int first_row = 0;                // of q and out
  int num_rows = 0;                 // tokens
  int first_position = 0;           // of the first token in its sequence
  const BlockId* blocks = nullptr;  // the sequence's table, up to the last token
};

// Absorbed MLA: queries [heads, dim] in latent space against one shared key per token, whose first
// value_dim columns are the value too. Causal.
//
// A row (token, head) goes through the keys in segments of 256. Each segment is an online softmax
// over its blocks from nothing, and the segments are merged in order. So a long sequence can be
// spread over threads, or not, with the same result to the last bit; and so can the rows.
class Attention {
 public:
  Attention(const LatentCache& cache, int num_heads, const Kernels& kernels, ThreadPool& pool);

  // q, out: [tokens, num_heads, dim] and [tokens, num_heads, value_dim] f32; q holds the softmax
  // scale already.
  void Run(int layer, absl::Span<const AttentionSpan> spans, const float* q, float* out);

 private:
  // Up to kAttentionRows (token, head) rows of one span.
  struct Tile {
    const AttentionSpan* span;
    int first;  // row within the span: token * num_heads + head
    int rows;
    int num_segments;
  };
  // A running softmax of some rows.
  struct Partial {
    float max[kAttentionRows];
    float sum[kAttentionRows];
    float* out;  // [kAttentionRows, value_dim]
  };
  struct Scratch {
    alignas(64) float scores[kAttentionRows * kAttentionKeys];
    Partial segment;
    Partial total;
    AlignedVector<float> storage;
  };

  void MakeTiles(absl::Span<const AttentionSpan> spans);
  void ComputeSegment(int layer, const Tile& tile, int segment, const float* q, Scratch& scratch,
                      Partial& part) const;
  void Merge(const Tile& tile, const Partial& part, Partial& total) const;
  void Reset(const Tile& tile, Partial& part) const;
  void Finish(const Tile& tile, const Partial& total, float* out) const;

  const LatentCache& cache_;
  const int num_heads_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  std::vector<std::unique_ptr<Scratch>> scratch_;  // [threads]
  std::vector<Tile> tiles_;
  std::vector<int64_t> first_segments_;  // [tiles] in the list of all segments
  std::vector<Partial> partials_;        // [all segments], when computed apart
  AlignedVector<float> partial_storage_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_ATTENTION_H_
