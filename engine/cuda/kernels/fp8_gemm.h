#ifndef LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_H_
#define LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "engine/cuda/kernels/tensors.h"

namespace latentd {

// out = x W^T in FP8 with 1x128 activation and 128x128 weight scales, for one matrix or a group of
// them, any shape with k % 128 == 0 and n % 64 == 0. Weights are the left operand of the tensor
// cores ("swap AB"), so that few rows waste nothing. Each element's sum runs over k in one order
// that n, k, num_groups and the GPU's number of multiprocessors fix: other rows, their number and
// the tile chosen for them change no bit.
struct Fp8GemmArgs {
  Fp8Rows x;  // [num_rows, k]; rows beyond the last of `group_offsets` are not read for a result
  int num_rows = 0;     // dense: rows. Grouped: the most that group_offsets[num_groups] can be
  WeightMatrix weight;  // fp8
  // [num_groups + 1] i32 on the device: group g has rows [group_offsets[g], group_offsets[g + 1]),
  // any number, also 0. nullptr: one group of num_rows rows.
  const int32_t* group_offsets = nullptr;
  int rows_per_group_hint =
      0;  // about how many rows a group has; chooses the tile. 0: num_rows / num_groups

  __nv_bfloat16* out = nullptr;  // [num_rows, n], or [num_rows, n / 2] with swiglu
  int64_t out_stride = 0;        // elements from row to row; a multiple of 8
  // n is 2 * width with gate_proj's and up_proj's rows interleaved by eights (weights.h); out =
  // silu(gate) * up.
  bool swiglu = false;

  // Fp8GemmWorkspaceBytes(), zeroed once before the first use. One call at a time may use it: calls
  // of a stream may share it.
  std::byte* workspace = nullptr;
};

size_t Fp8GemmWorkspaceBytes();

cudaError_t Fp8Gemm(const Fp8GemmArgs& args, cudaStream_t stream);

// What Fp8Gemm() chooses from the shape, for tests and benchmarks. 0: the choice.
struct Fp8GemmTuning {
  int row_tile = 0;       // rows of x a tile: 8, 16, 32, 64 or 128
  int stages = 0;         // at most, of the ring in shared memory; 2 or more
  int segments = 0;       // of k, that sums are grouped into; others give other bits
  int cluster = 0;        // thread blocks that share a tile of x: 1 or 2, with tiles of 128
  int guess_blocks = -1;  // of 128 of k, prefetched before the groups are known; -1: the choice
};
cudaError_t Fp8Gemm(const Fp8GemmArgs& args, const Fp8GemmTuning& tuning, cudaStream_t stream);

// The same product where its bound is the tensor cores: from about 128 rows a group on. Rows are
// the left operand of the tensor cores, so that a group costs whole tiles of 128. Each element's
// sum runs over k in its order: other rows change no bit, but Fp8Gemm() may give others. Needs no
// workspace.
cudaError_t Fp8GemmManyRows(const Fp8GemmArgs& args, cudaStream_t stream);

// For tests and benchmarks. 0: the choice.
struct Fp8GemmManyRowsTuning {
  int row_tile = 0;  // rows of x a tile: 128 or 256
  int cluster = 0;   // thread blocks that share a tile of x: 1 or 2
  int stages = 0;    // at most, of the ring in shared memory; 2 or more
};
cudaError_t Fp8GemmManyRows(const Fp8GemmArgs& args, const Fp8GemmManyRowsTuning& tuning,
                            cudaStream_t stream);

// The same product by plain loops in f32, for tests: exact up to the order of its sums.
cudaError_t Fp8GemmReference(const Fp8GemmArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_H_
