#ifndef LATENTD_ENGINE_CPU_MOE_H_
#define LATENTD_ENGINE_CPU_MOE_H_

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/cpu_model.h"
#include "engine/cpu/expert_exchange.h"
#include "engine/cpu/gemm.h"
#include "engine/trace_sink.h"

namespace latentd {

// Chooses a token's experts as Transformers' DeepseekV3TopkRouter does: sigmoid scores; for the
// choice plus e_score_correction_bias; the topk_group groups with the largest sum of their best
// two; of those the best num_experts_per_tok. On a tie the lower index wins.
//   scores   [n_routed_experts] f32, sigmoid of the router's logits
//   bias     [n_routed_experts] f32
//   experts  [num_experts_per_tok] out, ascending
//   weights  [num_experts_per_tok] f32 out, of the same order
void RouteToken(const ModelConfig& config, const float* scores, const float* bias, int32_t* experts,
                float* weights);

// The MLPs: dense, or routed and shared experts.
//
// Tokens are grouped by expert, so that each expert's weights are read once. A token's expert
// outputs are added in the order of their index, then the shared experts', whoever computed them
// when and where.
class Moe {
 public:
  Moe(const CpuModel& model, const Kernels& kernels, ThreadPool& pool, Gemm& gemm)
      : model_(model), kernels_(kernels), pool_(pool), gemm_(gemm) {}

  // out[rows, out_stride] = MLP of layer `layer` on x [rows, x_stride] (zeros beyond hidden_size);
  // rows >= 0. A MoE layer of a model that is one rank of a group goes through `exchange`, whose
  // errors it returns; there are no others. Null when all experts are here.
  absl::Status Run(int layer, const float* x, ptrdiff_t x_stride, int rows, float* out,
                   ptrdiff_t out_stride, ExpertExchange* exchange, TraceSink* trace);

 private:
  void Route(int layer, const float* x, ptrdiff_t x_stride, int rows, TraceSink* trace);
  void GroupByExpert(const RoutedRows& routed, ptrdiff_t x_stride);
  void ComputeMlps(int layer, const float* x, ptrdiff_t x_stride, int rows, float* out,
                   ptrdiff_t out_stride);
  void Activate(int assignments, int rows, int width, int shared_width);
  void AddOutputs(const ExpertOutputs& experts, int rows, float* out, ptrdiff_t out_stride);

  const CpuModel& model_;
  const Kernels& kernels_;
  ThreadPool& pool_;
  Gemm& gemm_;

  // Scratch. `rows` are this rank's tokens; an assignment is a (token, expert) pair whose expert is
  // here, the token being any rank's, and they are kept expert by expert.
  AlignedVector<float> scores_;       // [rows, n_routed_experts]
  std::vector<int32_t> experts_;      // [rows, num_experts_per_tok]
  AlignedVector<float> weights_;      // [rows, num_experts_per_tok]
  std::vector<int32_t> places_;       // [routed rows, num_experts_per_tok] the assignment, or -1
  std::vector<int32_t> first_;        // [n_routed_experts + 1] first assignment of each expert
  AlignedVector<float> gathered_;     // [assignments, x_stride]
  AlignedVector<float> gate_up_;      // [assignments, 2 * width], then [rows, 2 * shared width]
  AlignedVector<float> activations_;  // [assignments, padded width], [rows, padded shared width]
  AlignedVector<float> outputs_;      // [assignments, hidden_size]
  std::vector<GemmInput> inputs_;
  std::vector<GemmJob> jobs_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_MOE_H_
