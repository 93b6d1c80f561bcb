#ifndef LATENTD_SERVER_BENCH_KERNEL_TABLE_H_
#define LATENTD_SERVER_BENCH_KERNEL_TABLE_H_

#include "absl/status/status.h"
#include "engine/model/config.h"

namespace latentd {

// What the CUDA engine's kernels take on one H100, in microseconds, for DeepSeek-V3's dims: curves
// through what engine/cuda/README.md measured. kernel_table.cc says of each point where it comes
// from, cluster_facts.h in short.
//
// `rows` are tokens of one rank. All are of one layer but Head() and Sampling(). Between two points
// a curve is straight; beyond the last one it goes on as it ended.
struct KernelTable {
  // INVALID_ARGUMENT names the dim for which nothing was measured.
  static absl::Status CheckModel(const ModelConfig& model);

  static double Projections(double rows);    // q_a and kv_a, q_b, o
  static double Absorption(double queries);  // W_UK and W_UV; 0 for none
  // Absorbed attention over `pairs` pairs of a query and a key. `variation`: the standard deviation
  // of the sequences' pairs over their mean; the split over the GPU is worse where they differ.
  static double AbsorbedAttention(double pairs, double variation);
  // Attention of long chunks of prompts: `keys` latents expanded, `pairs` that causality leaves.
  static double ChunkAttention(double pairs, double keys);
  // Norms, RoPE, quantisation, gaps between kernels.
  static double SmallKernels(double rows);
  static double Router(double rows, double num_experts);
  // Gate and up, down of `experts` routed experts, each with as many rows: `rows` in all.
  static double RoutedExperts(double experts, double rows);
  // The shared expert, a group more in the same product.
  static double SharedExpert(double rows);
  static double DenseMlp(double rows);

  static double Head(double rows);
  static double Sampling(double rows);
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BENCH_KERNEL_TABLE_H_
