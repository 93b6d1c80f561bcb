#include "server/bench/kernel_table.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"

namespace latentd {
namespace {

struct Point {
  double x, us;
};

// Between two points in proportion; below the first one, that one; beyond the last one, as the last
// two go on.
double At(absl::Span<const Point> curve, double x) {
  if (x <= curve.front().x) return curve.front().us;
  size_t i = 1;
  while (i + 1 < curve.size() && curve[i].x < x) ++i;
  const Point &a = curve[i - 1], &b = curve[i];
  return a.us + (b.us - a.us) * (x - a.x) / (b.x - a.x);
}

// How long `flops` take at so many TFLOP/s.
constexpr double Us(double flops, double tflops) { return flops / tflops * 1e-6; }

// engine/cuda/README.md: one H100, 2026-11-24, and from 256 rows on one H200, 2026-11-30, which
// computes as an H100 does. "step": the table of a step's families at 64 sequences, less 1.5 us a
// timestamp.

// Dense products. 8 rows: the table of dense kernels. 64: the step (q_a, kv_a and q_b together).
// 128 and 256: cuBLASLt. 1,024 and 8,192: the table of many rows.
constexpr double kQueryKeyAFlops = 2.0 * 2112 * 7168, kQueryBFlops = 2.0 * 24576 * 1536,
                 kOutputFlops = 2.0 * 7168 * 16384, kDenseGateUpFlops = 2.0 * 36864 * 7168,
                 kDenseDownFlops = 2.0 * 7168 * 18432;
constexpr Point kQueryKeyA[] = {{8, 7.5},
                                {64, 10},
                                {1024, Us(1024 * kQueryKeyAFlops, 787)},
                                {8192, Us(8192 * kQueryKeyAFlops, 1000)}};
constexpr Point kQueryB[] = {{8, 13.5},
                             {64, 15.5},
                             {128, 20.1},
                             {256, 24.1},
                             {1024, Us(1024 * kQueryBFlops, 1003)},
                             {8192, Us(8192 * kQueryBFlops, 970)}};
constexpr Point kOutput[] = {{8, 42},
                             {64, 52},
                             {256, 55},
                             {1024, Us(1024 * kOutputFlops, 1045)},
                             {8192, Us(8192 * kOutputFlops, 1153)}};
constexpr Point kDenseGateUp[] = {{8, 89.2},
                                  {64, 109.9},
                                  {256, 120.7},
                                  {1024, Us(1024 * kDenseGateUpFlops, 1115)},
                                  {8192, Us(8192 * kDenseGateUpFlops, 1141)}};
constexpr Point kDenseDown[] = {{8, 47.1},
                                {64, 55},
                                {256, 60},
                                {1024, Us(1024 * kDenseDownFlops, 1105)},
                                {8192, Us(8192 * kDenseDownFlops, 1165)}};

// Kernels of their own, by tokens; 128: cuBLAS, the product alone.
constexpr Point kToLatent[] = {{1, 5.9}, {8, 6.6}, {32, 8.5}, {64, 10.4}, {128, 13}};
constexpr Point kFromLatent[] = {{1, 5.6}, {8, 6.0}, {32, 7.2}, {64, 9.6}, {128, 13}};
// Both residual norms, the latent norms with RoPE and the cache's rows.
constexpr Point kNorms[] = {{1, 6.7}, {8, 7.3}, {32, 8.6}, {64, 9.9}};
constexpr Point kRouter16[] = {{1, 4.6}, {8, 4.6}, {32, 5.4}, {64, 5.6}};
constexpr Point kRouter256[] = {{1, 6.1}, {8, 6.8}, {32, 8.5}, {64, 9.1}};

// What a layer takes beside the kernels listed: gather, quantisation of the experts' inputs, gaps.
// Fitted to the five measured decode steps (16.5, 24.8, 27.3, 28.4, 30.7 ms): within 2.5 % of each.
constexpr double kLayerRest = 19;
// Of a token's activations beyond 64 rows, where they are bound by memory, and what attention takes
// in a step beyond its kernel's own time. Fitted to the measured prefill, 10,900 tok/s with 8,192
// tokens a step. Of an expert's row: router, gather and quantisation took 34 ms of that step.
constexpr double kTokenRest = 0.19;
constexpr double kExpertRowRest = 0.009;

// FP8 products of the experts by rows each; 16 groups. From 256 on: the table of many rows.
constexpr double kGateUpFlops = 2.0 * 4096 * 7168, kDownFlops = 2.0 * 7168 * 2048;
constexpr Point kGateUp[] = {{1, 156.3},
                             {4, 157.1},
                             {8, 157.8},
                             {16, 158.1},
                             {32, 164.2},
                             {64, 175.4},
                             {128, 190.6},
                             {256, Us(16 * 256 * kGateUpFlops, 769)},
                             {512, Us(16 * 512 * kGateUpFlops, 958)},
                             {1024, Us(16 * 1024 * kGateUpFlops, 1075)},
                             {4096, Us(16 * 4096 * kGateUpFlops, 1124)}};
constexpr Point kDown[] = {{1, 81.1},
                           {4, 80.6},
                           {8, 80.7},
                           {16, 81.3},
                           {32, 84.4},
                           {64, 91.2},
                           {128, 103.4},
                           {256, Us(16 * 256 * kDownFlops, 706)},
                           {512, Us(16 * 512 * kDownFlops, 839)},
                           {1024, Us(16 * 1024 * kDownFlops, 958)},
                           {4096, Us(16 * 4096 * kDownFlops, 1034)}};
constexpr double kMeasuredGroups = 16;
// What a 17th group adds, by its rows: up to 64 the table of 17 groups less that of 16; beyond,
// what the table of many rows, whose 17th group is twice as large as the others, leaves for it.
constexpr Point kSharedGateUp[] = {{1, 14.5},
                                   {8, 15.9},
                                   {16, 15.6},
                                   {32, 19.0},
                                   {64, 29.3},
                                   {256, 28.6},
                                   {512, Us(512 * kGateUpFlops, 769)},
                                   {1024, Us(1024 * kGateUpFlops, 958)},
                                   {8192, Us(8192 * kGateUpFlops, 1124)}};
constexpr Point kSharedDown[] = {{1, 5.5},
                                 {8, 7.7},
                                 {16, 7.5},
                                 {32, 10.2},
                                 {64, 13.5},
                                 {256, 16.3},
                                 {512, Us(512 * kDownFlops, 706)},
                                 {1024, Us(1024 * kDownFlops, 839)},
                                 {8192, Us(8192 * kDownFlops, 1034)}};

// Absorbed attention by pairs of a query and a key: 1, 8, 32 and 64 sequences of 2,048 keys, and 64
// of 4,096.
constexpr Point kAbsorbed[] = {
    {2048, 19.7}, {16384, 25.5}, {65536, 55.1}, {131072, 78}, {262144, 149}};
// 64 sequences of 256 to 4,096 keys took 106 us; the curve says 74 for as many pairs. They vary by
// half of their mean. In between: assumed to grow in proportion.
constexpr double kRaggedLoss = 0.43, kRaggedVariation = 0.5;

// Long chunks: attention at 570 TFLOP/s, expansion of 4 times 2,048 keys in 430 us.
constexpr double kChunkTflops = 570, kExpansionOfKey = 430.0 / 8192, kChunkFixed = 15;
constexpr double kPairFlops = 2.0 * 128 * (192 + 128);

// 64 rows: measured, bound by the weights' bytes. 256: assumed, 630 TFLOP/s of bf16.
constexpr Point kHead[] = {
    {1, 690}, {64, 690}, {128, 700}, {256, Us(2.0 * 256 * 129280 * 7168, 630)}};
// Vocabulary of 129,280, no limits.
constexpr Point kSampling[] = {{1, 13}, {8, 16}, {64, 54}};

}  // namespace

absl::Status KernelTable::CheckModel(const ModelConfig& model) {
  struct Dim {
    const char* name;
    int64_t value, measured;
  };
  for (const Dim& dim : {Dim{"hidden_size", model.hidden_size, 7168},
                         Dim{"q_lora_rank", model.q_lora_rank.value_or(0), 1536},
                         Dim{"kv_lora_rank", model.kv_lora_rank, 512},
                         Dim{"num_attention_heads", model.num_attention_heads, 128},
                         Dim{"qk_nope_head_dim", model.qk_nope_head_dim, 128},
                         Dim{"qk_rope_head_dim", model.qk_rope_head_dim, 64},
                         Dim{"v_head_dim", model.v_head_dim, 128},
                         Dim{"intermediate_size", model.intermediate_size, 18432},
                         Dim{"moe_intermediate_size", model.moe_intermediate_size, 2048},
                         Dim{"n_shared_experts", model.n_shared_experts, 1},
                         Dim{"vocab_size", model.vocab_size, 129280}}) {
    if (dim.value == dim.measured) continue;
    return absl::InvalidArgumentError(absl::StrCat("the kernels were measured with ", dim.name, " ",
                                                   dim.measured, "; this model has ", dim.value));
  }
  if (!model.quantization) {
    return absl::InvalidArgumentError(
        "the kernels were measured with FP8 weights; this model's "
        "config.json has no quantization_config");
  }
  return absl::OkStatus();
}

double KernelTable::Projections(double rows) {
  return At(kQueryKeyA, rows) + At(kQueryB, rows) + At(kOutput, rows);
}

double KernelTable::Absorption(double queries) {
  return queries == 0 ? 0 : At(kToLatent, queries) + At(kFromLatent, queries);
}

double KernelTable::AbsorbedAttention(double pairs, double variation) {
  if (pairs == 0) return 0;
  const double uneven = std::min(1.0, variation / kRaggedVariation);
  return At(kAbsorbed, pairs) * (1 + kRaggedLoss * uneven);
}

double KernelTable::ChunkAttention(double pairs, double keys) {
  if (pairs == 0) return 0;
  return kChunkFixed + Us(pairs * kPairFlops, kChunkTflops) + keys * kExpansionOfKey;
}

double KernelTable::SmallKernels(double rows) {
  return kLayerRest + At(kNorms, std::min(rows, 64.0)) + kTokenRest * std::max(0.0, rows - 64);
}

double KernelTable::Router(double rows, double num_experts) {
  const double share = std::clamp((num_experts - 16) / (256 - 16), 0.0, 1.0);
  return At(kRouter16, rows) * (1 - share) + At(kRouter256, rows) * share;
}

double KernelTable::RoutedExperts(double experts, double rows) {
  if (experts == 0 || rows == 0) return 0;
  const double each = rows / experts;
  return (At(kGateUp, each) + At(kDown, each)) * experts / kMeasuredGroups +
         kExpertRowRest * std::max(0.0, rows - 64 * 8);
}

double KernelTable::SharedExpert(double rows) {
  return At(kSharedGateUp, rows) + At(kSharedDown, rows);
}

double KernelTable::DenseMlp(double rows) { return At(kDenseGateUp, rows) + At(kDenseDown, rows); }

double KernelTable::Head(double rows) { return rows == 0 ? 0 : At(kHead, rows); }

double KernelTable::Sampling(double rows) { return rows == 0 ? 0 : At(kSampling, rows); }

}  // namespace latentd
