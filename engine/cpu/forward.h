#ifndef LATENTD_ENGINE_CPU_FORWARD_H_
#define LATENTD_ENGINE_CPU_FORWARD_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/attention.h"
#include "engine/cpu/cpu_model.h"
#include "engine/cpu/expert_exchange.h"
#include "engine/cpu/gemm.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/moe.h"
#include "engine/cpu/thread_pool.h"
#include "engine/step.h"
#include "engine/trace_sink.h"

namespace latentd {

// One forward pass over the tokens of a plan: embeddings, layers, logits. The plan is valid
// (cpu_engine.cc checks it). Layer by layer, the tokens go through in tiles of kTileTokens, which
// bounds the memory of the activations.
class Forward {
 public:
  static constexpr int kTileTokens = 512;

  // The arguments must outlive it.
  Forward(const CpuModel& model, const Kernels& kernels, ThreadPool& pool, LatentCache& cache,
          int32_t max_step_tokens);

  // Computes the last layer's output of every token of `plan` and writes the cache. With an
  // `exchange`, as one rank of a group: plan.shape says how many tiles there are, of which this
  // rank takes part in all, with tokens or without. An error is the exchange's.
  absl::Status Run(const StepPlan& plan, ExpertExchange* exchange = nullptr,
                   TraceSink* trace = nullptr);

  // The logits of tokens `rows` of the last plan: out [rows, vocab_size] f32.
  void Logits(absl::Span<const int32_t> rows, float* out, TraceSink* trace = nullptr);

  // Bytes of the activations; in a group, when its ranks choose no experts but this rank's.
  static uint64_t NumBytes(const ModelConfig& config, int32_t max_step_tokens,
                           const Placement& placement = {});

 private:
  void Embed(const StepPlan& plan, TraceSink* trace);
  // Tokens [begin, end) of the step through one layer.
  absl::Status RunTile(const StepPlan& plan, int layer, int begin, int end,
                       ExpertExchange* exchange, TraceSink* trace);
  // Tokens [begin, end) of the step, as parts of sequences.
  void MakeSpans(const StepPlan& plan, int begin, int end);
  void AttentionLayer(int layer, int begin, int end, TraceSink* trace);
  void ProjectQueriesAndKeys(const PackedLayer& weights, int rows);
  void FinishQueriesAndKeys(int layer, int begin, int rows, TraceSink* trace);
  void Normalize(const float* x, ptrdiff_t x_stride, const std::vector<float>& weight, float eps,
                 int rows, float* out, ptrdiff_t out_stride);

  const CpuModel& model_;
  const ModelConfig& config_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  LatentCache& cache_;
  Gemm gemm_;
  Moe moe_;
  Attention attention_;

  // Strides in floats; all but hidden_'s are padded with zeros to kRowPadding for the next product.
  const ptrdiff_t x_stride_;          // hidden_size
  const ptrdiff_t q_a_stride_;        // q_lora_rank
  const ptrdiff_t q_stride_;          // num_heads * qk_head_dim
  const ptrdiff_t kv_a_stride_;       // latent_dim
  const ptrdiff_t attention_stride_;  // num_heads * v_head_dim

  AlignedVector<float> hidden_;         // [max_step_tokens, hidden_size] residual stream
  AlignedVector<float> x_;              // [tile, x_stride] normalised
  AlignedVector<float> q_a_;            // [tile, q_a_stride]
  AlignedVector<float> q_;              // [tile, q_stride]
  AlignedVector<float> kv_a_;           // [tile, kv_a_stride]
  AlignedVector<float> latent_q_;       // [tile, num_heads, cache dim]
  AlignedVector<float> latent_out_;     // [tile, num_heads, cache value_dim]
  AlignedVector<float> attention_out_;  // [tile, attention_stride]
  AlignedVector<float> block_out_;      // [tile, hidden_size] of o_proj or the MLP
  AlignedVector<float> last_;           // [rows, x_stride] of Logits

  // Of the step's tokens.
  struct Token {
    int32_t position;
    float* cache_row;  // in layer 0
  };
  std::vector<Token> tokens_;
  std::vector<AttentionSpan> spans_;
  std::vector<GemmInput> inputs_;
  std::vector<GemmJob> jobs_;
  float softmax_scale_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_FORWARD_H_
