// Grouped products of bf16 weights on mma.sync: blocks of 64 rows of x by 64 rows of weights, k in
// steps of 32 through a ring of cp.async stages. Few rows are bound by the bytes of the weights,
// many by the tensor cores at mma.sync's rate. An element's sum runs over k in steps of 16, in
// order, whatever else its block computes.

#include <algorithm>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mma_sync.cuh"
#include "engine/cuda/kernels/moe.h"

namespace latentd {
namespace {

constexpr int kTileRows = 64, kTileColumns = 64, kStepK = 32;
constexpr int kThreads = 128;  // 2 x 2 warps of 32 x 32
constexpr int kStages = 6;
constexpr int kVectors = kStepK / 8;  // 16-byte vectors of a tile's row

struct alignas(16) Stage {
  uint4 x[kTileRows][kVectors];
  uint4 weight[kTileColumns][kVectors];
};

struct Tile {
  int group, first_row, end_row;  // rows [first_row, end_row) of x, at most kTileRows of them
};

// Tile `index` of all groups' tiles of rows, in order; group -1 beyond the last. All lanes of a
// warp.
__device__ __forceinline__ Tile FindTile(const int32_t* group_offsets, int num_groups, int index) {
  const int lane = threadIdx.x % 32;
  int before = 0;
  for (int base = 0; base < num_groups; base += 32) {
    const int group = base + lane;
    int begin = 0, end = 0;
    if (group < num_groups) {
      begin = group_offsets[group];
      end = group_offsets[group + 1];
    }
    const int tiles = (end - begin + kTileRows - 1) / kTileRows;
    int through = tiles;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(~0u, through, d);
      if (lane >= d) through += below;
    }
    const unsigned holders = __ballot_sync(~0u, before + through > index);
    if (holders != 0) {
      const int holder = __ffs(holders) - 1;
      const int first = begin + (index - before - (through - tiles)) * kTileRows;
      return {base + holder, __shfl_sync(~0u, first, holder),
              __shfl_sync(~0u, min(first + kTileRows, end), holder)};
    }
    before += __shfl_sync(~0u, through, 31);
  }
  return {-1, 0, 0};
}

__device__ __forceinline__ float Silu(float x) { return x / (1.0f + expf(-x)); }

__global__ void __launch_bounds__(kThreads) Bf16Gemm(Bf16GemmArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  Stage* stages = reinterpret_cast<Stage*>(shared);
  WaitForPrevious();
  LetNextBegin();

  Tile tile = {0, static_cast<int>(blockIdx.y) * kTileRows, 0};
  if (args.group_offsets == nullptr) {
    tile.end_row = min(tile.first_row + kTileRows, args.num_rows);
  } else {
    tile = FindTile(args.group_offsets, args.weight.num_groups, blockIdx.y);
    if (tile.group < 0) return;
  }

  const int k = args.weight.k, n = args.weight.n, first_column = blockIdx.x * kTileColumns;
  const __nv_bfloat16* weight = args.weight.bf16 + static_cast<int64_t>(tile.group) * n * k;
  const int steps = k / kStepK;
  const auto load = [&](int step) {
    if (step < steps) {
      Stage& stage = stages[step % kStages];
#pragma unroll
      for (int i = 0; i < kTileRows * kVectors / kThreads; ++i) {
        const int at = threadIdx.x + i * kThreads, row = at / kVectors, vector = at % kVectors;
        const int x_row = tile.first_row + row, column = first_column + row;
        const int64_t within = step * kStepK + vector * 8;
        CopyAsync16(&stage.x[row][vector],
                    args.x + static_cast<int64_t>(min(x_row, tile.end_row - 1)) * k + within,
                    x_row < tile.end_row);
        CopyAsync16(&stage.weight[row][vector],
                    weight + static_cast<int64_t>(min(column, n - 1)) * k + within, column < n);
      }
    }
    CopyAsyncCommit();  // also an empty group: the count below stays right
  };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, c = lane % 4;
  const int warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  float sums[2][4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) load(step);
  for (int step = 0; step < steps; ++step) {
    CopyAsyncWait<kStages - 2>();
    __syncthreads();  // the step has arrived for all, and all are done with the stage that is
                      // loaded next
    load(step + kStages - 1);
    const Stage& stage = stages[step % kStages];
    // A lane takes 8 elements of k in one load: the tensor core sees them in an order of our own,
    // the same for x and weights.
    uint4 a[2][2], b[4];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      a[m][0] = stage.x[warp_row + 16 * m + g][c];
      a[m][1] = stage.x[warp_row + 16 * m + g + 8][c];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) b[j] = stage.weight[warp_column + 8 * j + g][c];
#pragma unroll
    for (int m = 0; m < 2; ++m) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        MmaBf16(sums[m][j], a[m][0].x, a[m][1].x, a[m][0].y, a[m][1].y, b[j].x, b[j].y);
        MmaBf16(sums[m][j], a[m][0].z, a[m][1].z, a[m][0].w, a[m][1].w, b[j].z, b[j].w);
      }
    }
  }

#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = tile.first_row + warp_row + 16 * m + 8 * half + g;
      if (row >= tile.end_row) continue;
      __nv_bfloat16* out = args.out + row * args.out_stride;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* sum = &sums[m][j][2 * half];
        const int column = first_column + warp_column + 8 * j + 2 * c;
        if (!args.swiglu) {
          if (column < n)
            *reinterpret_cast<__nv_bfloat162*>(out + column) =
                __floats2bfloat162_rn(sum[0], sum[1]);
        } else if (j % 2 == 0 && column < n) {
          // Tile j holds eight rows of gate_proj, tile j + 1 the same eight of up_proj.
          const float* up = &sums[m][j + 1][2 * half];
          const int width_column = (first_column + warp_column + 8 * j) / 2 + 2 * c;
          *reinterpret_cast<__nv_bfloat162*>(out + width_column) =
              __floats2bfloat162_rn(Silu(sum[0]) * up[0], Silu(sum[1]) * up[1]);
        }
      }
    }
  }
}

}  // namespace

cudaError_t GroupedBf16Gemm(const Bf16GemmArgs& args, cudaStream_t stream) {
  const WeightMatrix& weight = args.weight;
  if (args.num_rows < 0 || weight.n < 1 || weight.n % 16 != 0 || weight.k < 1 ||
      weight.k % kStepK != 0 || weight.num_groups < 1 ||
      (args.group_offsets == nullptr && weight.num_groups != 1) || weight.bf16 == nullptr ||
      args.out_stride < (args.swiglu ? weight.n / 2 : weight.n) || args.out_stride % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  if (args.num_rows == 0) return cudaSuccess;
  if (args.x == nullptr || args.out == nullptr) return cudaErrorInvalidValue;
  // A group's last tile may be ragged, and no group has more tiles than rows.
  int tiles = (args.num_rows + kTileRows - 1) / kTileRows;
  if (args.group_offsets != nullptr) tiles = std::min(args.num_rows, tiles + weight.num_groups - 1);
  constexpr int kShared = kStages * static_cast<int>(sizeof(Stage));
  static_assert(kShared <= 48 * 1024);
  const dim3 grid((weight.n + kTileColumns - 1) / kTileColumns, tiles);
  return Launch(Bf16Gemm, {.grid = grid, .block = dim3(kThreads), .shared_bytes = kShared}, stream,
                args);
}

}  // namespace latentd
