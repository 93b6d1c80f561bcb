#ifndef LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_GROUPS_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_GROUPS_CUH_

#include <cstdint>

// Where the tiles of a grouped product lie: what the kernels behind fp8_gemm.h share.
namespace latentd::fp8_gemm {

inline constexpr int kMaxGroups = 512;

// Where the tiles of a group begin whose rows begin at `row`: TMA wants the scales of x, 4 bytes a
// row, from multiples of 16 bytes.
__device__ __forceinline__ int FirstRow(int row) { return row & ~3; }

// Fills tile_begin and row_begin [num_groups + 1]: where each group's tiles, of kRows rows and one
// of `tiles_across` pieces of a weight, and its rows begin. No group_offsets: one group of
// num_rows. One warp.
template <int kRows>
__device__ __forceinline__ void FindGroups(const int32_t* group_offsets, int num_groups,
                                           int num_rows, int tiles_across, int* tile_begin,
                                           int* row_begin) {
  const int lane = threadIdx.x % 32;
  int tiles = 0;
  if (group_offsets == nullptr) {
    if (lane == 0) {
      tile_begin[0] = row_begin[0] = 0;
      tile_begin[1] = (num_rows + kRows - 1) / kRows * tiles_across;
      row_begin[1] = num_rows;
    }
    return;
  }
  for (int first = 0; first < num_groups; first += 32) {
    const int group = first + lane;
    int sum = 0;
    if (group < num_groups) {
      const int begin = group_offsets[group], end = group_offsets[group + 1];
      if (end > begin) sum = (end - FirstRow(begin) + kRows - 1) / kRows * tiles_across;
      row_begin[group] = begin;
      if (group == num_groups - 1) row_begin[group + 1] = end;
    }
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, sum, step);
      if (lane >= step) sum += other;
    }
    if (group < num_groups) tile_begin[group + 1] = tiles + sum;
    tiles += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) tile_begin[0] = 0;
}

}  // namespace latentd::fp8_gemm

#endif  // LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_GROUPS_CUH_
