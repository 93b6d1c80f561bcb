#ifndef LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_MANY_ROWS_KERNEL_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_MANY_ROWS_KERNEL_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "engine/cuda/kernels/fp8_gemm_groups.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/ptx.cuh"
#include "engine/cuda/kernels/wgmma_fp8.cuh"

// The kernel behind Fp8GemmManyRows(), whose bound is the tensor cores. Rows of x are their left
// operand: a thread then scales its products by two factors instead of 32. A tile is 128 kBlocks
// rows of x by 128 rows of a weight; a thread block, one a multiprocessor, works through tiles. Two
// threads, one for weights and one for x and its scales, fill a ring of stages (128 of k) by TMA;
// two warpgroups multiply 64 rows of each 128, one 64 after the other, and scale and add what came
// out of the tensor cores while these compute for the other warpgroup. With kCluster 2 the blocks
// of a pair take the same rows and neighbouring weights, and each loads half of the rows for both.
// Both halve what is read from L2, which would else be the bound.
//
// An element is the sum over k in its order, 128 by 128: no other row or group changes its bits.
namespace latentd::fp8_gemm_many_rows {

using fp8_gemm::FindGroups;
using fp8_gemm::FirstRow;
using fp8_gemm::kMaxGroups;

inline constexpr int kTileN = 128;
inline constexpr int kTileK = 128;
inline constexpr int kBlockRows = 128;  // 64 of each warpgroup
inline constexpr int kMathThreads = 256;
inline constexpr int kThreads = kMathThreads + 128;
// Rows of x that pass over the same weights before the next ones come: they stay in L2.
inline constexpr int kRowsTogether = 2048;

struct Params {
  const float* weight_scales;  // [groups, weight_scale_rows, weight_scale_stride]
  int weight_scale_stride;
  int weight_scale_rows;
  const int32_t* group_offsets;  // nullptr: one group of num_rows
  int num_groups;
  int num_rows;
  int n;
  int k_blocks;
  int n_tiles;  // of kCluster tiles each
  int stages;
  __nv_bfloat16* out;
  int64_t out_stride;
};

// Offsets into shared memory.
template <int kBlocks>
struct Layout {
  static constexpr int kWeightBytes = kTileN * kTileK;
  static constexpr int kBlockBytes = kBlockRows * kTileK;
  static constexpr int kXBytes = kBlocks * kBlockBytes;
  static constexpr int kXScaleBytes = kBlocks * kBlockRows * 4;
  static constexpr int kStageBytes = kWeightBytes + kXBytes + kXScaleBytes + 2 * 8;
  // Of a warp: 16 rows of 64 columns; what is added to a row keeps off bank conflicts.
  static constexpr int kOutPitch = 64 * 2 + 16;
  static constexpr int kOutBytes = kMathThreads / 32 * 16 * kOutPitch;

  int x, x_scales, out, full, empty, groups, total;

  __host__ __device__ Layout(int stages, int num_groups) {
    x = stages * kWeightBytes;
    x_scales = x + stages * kXBytes;
    out = x_scales + stages * kXScaleBytes;
    full = out + kOutBytes;
    empty = full + stages * 8;
    groups = empty + stages * 8;
    total = groups + 2 * (num_groups + 1) * 4;
  }
};

struct Tile {
  int group;
  int n_tile;              // the thread block's own
  int row;                 // of x where the tile begins
  int row_begin, row_end;  // those of its rows that are the group's
  int blocks;              // of 128 rows that hold any of these
};

// Walks over this thread block's tiles. All roles walk the same way.
template <int kBlocks, int kCluster>
class Walk {
 public:
  // FindGroups()'s.
  __device__ __forceinline__ Walk(const Params& params, const int* tile_begin, const int* row_begin)
      : params_(params),
        tile_begin_(tile_begin),
        row_begin_(row_begin),
        unit_(blockIdx.x / kCluster) {}

  __device__ __forceinline__ bool Next(Tile& tile) {
    constexpr int kRows = kBlocks * kBlockRows, kTogether = kRowsTogether / kRows;
    if (unit_ >= tile_begin_[params_.num_groups]) return false;
    while (tile_begin_[group_ + 1] <= unit_) ++group_;
    const int index = unit_ - tile_begin_[group_];
    unit_ += gridDim.x / kCluster;
    const int group_begin = row_begin_[group_], group_end = row_begin_[group_ + 1];
    const int first_row = FirstRow(group_begin);
    const int row_tiles = (group_end - first_row + kRows - 1) / kRows;
    const int band = index / (kTogether * params_.n_tiles);
    const int in_band = index - band * kTogether * params_.n_tiles;
    const int width = min(kTogether, row_tiles - band * kTogether);
    const int n_tile = in_band / width;
    tile.group = group_;
    tile.n_tile = n_tile * kCluster + static_cast<int>(blockIdx.x % kCluster);
    tile.row = first_row + (band * kTogether + in_band - n_tile * width) * kRows;
    tile.row_begin = max(tile.row, group_begin);
    tile.row_end = min(tile.row + kRows, group_end);
    tile.blocks = (tile.row_end - tile.row + kBlockRows - 1) / kBlockRows;
    return true;
  }

 private:
  const Params& params_;
  const int* const tile_begin_;
  const int* const row_begin_;
  int unit_;
  int group_ = 0;
};

// Which stage of the ring comes next.
struct Ring {
  int stage = 0;
  uint32_t parity;

  __device__ __forceinline__ void Advance(int stages) {
    if (++stage == stages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Calls load(tile, block, stage) for each 128 of k of this thread block's tiles, once the stage is
// free.
template <int kBlocks, int kCluster, typename Load>
__device__ __forceinline__ void Produce(const Params& p, uint32_t empty, const int* tile_begin,
                                        const int* row_begin, Load load) {
  Walk<kBlocks, kCluster> walk(p, tile_begin, row_begin);
  Tile tile;
  Ring ring = {.parity = 1};
  while (walk.Next(tile)) {
    for (int block = 0; block < p.k_blocks; ++block) {
      MbarrierWait(empty + ring.stage * 8, ring.parity);
      load(tile, block, ring.stage);
      ring.Advance(p.stages);
    }
  }
}

// One thread. Weights are constant: they come while the previous kernel still runs.
template <int kBlocks, int kCluster>
__device__ __forceinline__ void ProduceWeights(const Params& p, const CUtensorMap& weight_map,
                                               uint32_t shared, const Layout<kBlocks>& at,
                                               const int* tile_begin, const int* row_begin) {
  using L = Layout<kBlocks>;
  Produce<kBlocks, kCluster>(
      p, shared + at.empty, tile_begin, row_begin, [&](const Tile& tile, int block, int stage) {
        const uint32_t full = shared + at.full + stage * 8;
        MbarrierArriveExpect(full,
                             L::kWeightBytes + tile.blocks * L::kBlockBytes + L::kXScaleBytes);
        TmaLoad3d(shared + stage * L::kWeightBytes, &weight_map, full, block * kTileK,
                  tile.n_tile * kTileN, tile.group, CachePolicy::kNormal);
      });
}

// One thread.
template <int kBlocks, int kCluster>
__device__ __forceinline__ void ProduceX(const Params& p, const CUtensorMap& x_map,
                                         const CUtensorMap& x_scale_map, uint32_t shared,
                                         const Layout<kBlocks>& at, const int* tile_begin,
                                         const int* row_begin) {
  using L = Layout<kBlocks>;
  WaitForPrevious();
  Produce<kBlocks, kCluster>(
      p, shared + at.empty, tile_begin, row_begin, [&](const Tile& tile, int block, int stage) {
        const uint32_t full = shared + at.full + stage * 8;
        const uint32_t to = shared + at.x + stage * L::kXBytes;
        for (int i = 0; i < tile.blocks; ++i) {
          const int row = tile.row + i * kBlockRows;
          if constexpr (kCluster == 1) {
            TmaLoad2d(to + i * L::kBlockBytes, &x_map, full, block * kTileK, row);
          } else {
            const int part = static_cast<int>(blockIdx.x % kCluster);
            TmaLoad2dMulticast(to + i * L::kBlockBytes + part * (L::kBlockBytes / kCluster), &x_map,
                               full, block * kTileK, row + part * (kBlockRows / kCluster),
                               (1 << kCluster) - 1);
          }
        }
        TmaLoad2d(shared + at.x_scales + stage * L::kXScaleBytes, &x_scale_map, full, tile.row,
                  block);
      });
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return __fdividef(gate, 1.0f + __expf(-gate)) * up;
}

// The scales of a tile's weights: of gate and up, whose blocks of 128 are apart, or the same twice.
struct WeightScales {
  const float* low;
  const float* high;

  template <bool kSwiglu>
  static __device__ __forceinline__ WeightScales Of(const Params& p, const Tile& tile) {
    // The last block of a cluster may have no rows of the weights.
    const int row = min(kSwiglu ? tile.n_tile / 2 : tile.n_tile, p.weight_scale_rows - 1);
    const float* low =
        p.weight_scales +
        (static_cast<int64_t>(tile.group) * p.weight_scale_rows + row) * p.weight_scale_stride;
    return {low, kSwiglu
                     ? low + static_cast<int64_t>(p.weight_scale_rows / 2) * p.weight_scale_stride
                     : low};
  }
};

// What a warpgroup needs of its thread block.
template <int kBlocks>
struct Math {
  const Params& p;
  unsigned char* shared;
  const Layout<kBlocks>& at;
  int warpgroup;  // 0 or 1
  Ring ring;
};

// The sums of this warpgroup's rows of a tile with kUsed blocks of rows.
template <int kUsed, bool kSwiglu, int kCluster, int kBlocks>
__device__ __forceinline__ void MultiplyTile(Math<kBlocks>& m, const WeightScales& scales,
                                             float (&sum)[kBlocks][64]) {
  using L = Layout<kBlocks>;
  const uint32_t base = SharedAddress(m.shared);
  const int lane = threadIdx.x % 32;
  const int row = static_cast<int>(threadIdx.x / 32) * 16 + lane / 4;  // and row + 8, of a block
  float next_low = __ldg(scales.low), next_high = kSwiglu ? __ldg(scales.high) : 0;
  for (int block = 0; block < m.p.k_blocks; ++block) {
    const int stage = m.ring.stage;
    const float low = next_low, high = kSwiglu ? next_high : next_low;
    const int next = min(block + 1, m.p.k_blocks - 1);
    next_low = __ldg(scales.low + next);
    if constexpr (kSwiglu) next_high = __ldg(scales.high + next);
    MbarrierWait(base + m.at.full + stage * 8, m.ring.parity);
    const float* x_scales =
        reinterpret_cast<const float*>(m.shared + m.at.x_scales + stage * L::kXScaleBytes) + row;
    const uint64_t b = WgmmaDescriptor(base + stage * L::kWeightBytes);
#pragma unroll
    for (int i = 0; i < kUsed; ++i) {
      const float x_scale = x_scales[i * kBlockRows], x_scale8 = x_scales[i * kBlockRows + 8];
      float products[64];
      const uint64_t a = WgmmaDescriptor(base + m.at.x + stage * L::kXBytes + i * L::kBlockBytes +
                                         m.warpgroup * 64 * kTileK);
      WgmmaPin(products);
      WgmmaFence();
#pragma unroll
      for (int j = 0; j < kTileK / 32; ++j)
        WgmmaFp8<kTileN>::Run(products, a + j * 2, b + j * 2, j != 0);
      WgmmaCommit();
      WgmmaPin(products);
      WgmmaWait<0>();
      WgmmaPin(products);
      if (i == kUsed - 1) {
        __syncwarp();
        if constexpr (kCluster == 1) {
          if (lane == 0) MbarrierArrive(base + m.at.empty + stage * 8);
        } else {
          if (lane < kCluster) MbarrierArriveRemote(base + m.at.empty + stage * 8, lane);
        }
      }
      const float factors[2][2] = {{__fmul_rn(low, x_scale), __fmul_rn(low, x_scale8)},
                                   {__fmul_rn(high, x_scale), __fmul_rn(high, x_scale8)}};
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        // Eight columns of gate, eight of up.
        const float* factor = factors[kSwiglu ? j % 2 : 0];
        float* s = sum[i] + 4 * j;
        s[0] = __fmaf_rn(products[4 * j], factor[0], s[0]);
        s[1] = __fmaf_rn(products[4 * j + 1], factor[0], s[1]);
        s[2] = __fmaf_rn(products[4 * j + 2], factor[1], s[2]);
        s[3] = __fmaf_rn(products[4 * j + 3], factor[1], s[3]);
      }
    }
    m.ring.Advance(m.p.stages);
  }
}

// A warp's 16 rows by 64 columns of bf16, from its staging area to `out` [.., 64 columns]; `row` is
// the first one's.
__device__ __forceinline__ void StoreRows(const Tile& tile, int row, __nv_bfloat16* out,
                                          int64_t out_stride, const unsigned char* staging,
                                          int pitch) {
  const int lane = threadIdx.x % 32, chunk = lane % 8;
#pragma unroll
  for (int i = lane / 8; i < 16; i += 4) {
    const uint4 values = *reinterpret_cast<const uint4*>(staging + i * pitch + chunk * 16);
    if (row + i >= tile.row_begin && row + i < tile.row_end)
      *reinterpret_cast<uint4*>(out + (row + i) * out_stride + chunk * 8) = values;
  }
}

// The sums of one block of a tile's rows.
template <bool kSwiglu, int kBlocks>
__device__ __forceinline__ void Store(const Math<kBlocks>& m, const Tile& tile, int block,
                                      const float (&sum)[64]) {
  using L = Layout<kBlocks>;
  constexpr int kColumns = kSwiglu ? 64 : 128;
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x / 32);
  unsigned char* const staging = m.shared + m.at.out + warp * 16 * L::kOutPitch;
  const uint32_t to =
      SharedAddress(staging) + (lane % 16) * L::kOutPitch + lane / 16 * 16;  // StoreMatrices()
  const int row = tile.row + block * kBlockRows + warp * 16;
#pragma unroll
  for (int begin = 0; begin < kColumns; begin += 64) {
    __syncwarp();  // what was staged before has been stored
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // 16 columns
      if constexpr (kSwiglu) {
        const float* s = sum + 16 * i;
        StoreMatrices(to + i * 32, PackBf16(SiluTimes(s[0], s[4]), SiluTimes(s[1], s[5])),
                      PackBf16(SiluTimes(s[2], s[6]), SiluTimes(s[3], s[7])),
                      PackBf16(SiluTimes(s[8], s[12]), SiluTimes(s[9], s[13])),
                      PackBf16(SiluTimes(s[10], s[14]), SiluTimes(s[11], s[15])));
      } else {
        const float* s = sum + begin / 2 + 8 * i;
        StoreMatrices(to + i * 32, PackBf16(s[0], s[1]), PackBf16(s[2], s[3]), PackBf16(s[4], s[5]),
                      PackBf16(s[6], s[7]));
      }
    }
    __syncwarp();
    const int column = tile.n_tile * kColumns + begin;
    if (column >= (kSwiglu ? m.p.n / 2 : m.p.n)) continue;
    StoreRows(tile, row, m.p.out + column, m.p.out_stride, staging, L::kOutPitch);
  }
}

// One warpgroup.
template <int kBlocks, bool kSwiglu, int kCluster>
__device__ __forceinline__ void Multiply(const Params& p, unsigned char* shared,
                                         const Layout<kBlocks>& at, const int* tile_begin,
                                         const int* row_begin, int warpgroup) {
  Math<kBlocks> m = {p, shared, at, warpgroup, {.parity = 0}};
  Walk<kBlocks, kCluster> walk(p, tile_begin, row_begin);
  Tile tile;
  while (walk.Next(tile)) {
    const WeightScales scales = WeightScales::Of<kSwiglu>(p, tile);
    float sum[kBlocks][64];
#pragma unroll
    for (int i = 0; i < kBlocks * 64; ++i) sum[i / 64][i % 64] = 0;
    if (kBlocks == 1 || tile.blocks == kBlocks) {
      MultiplyTile<kBlocks, kSwiglu, kCluster>(m, scales, sum);
    } else {
      MultiplyTile<1, kSwiglu, kCluster>(m, scales, sum);
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      if (block < tile.blocks) Store<kSwiglu>(m, tile, block, sum[block]);
    }
  }
}

template <int kBlocks, bool kSwiglu, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    Kernel(const Params params, const __grid_constant__ CUtensorMap weight_map,
           const __grid_constant__ CUtensorMap x_map,
           const __grid_constant__ CUtensorMap x_scale_map) {
  static_assert(kBlocks == 1 || kBlocks == 2);
  extern __shared__ __align__(1024) unsigned char shared[];
  const Layout<kBlocks> at(params.stages, params.num_groups);
  int* const tile_begin = reinterpret_cast<int*>(shared + at.groups);
  int* const row_begin = tile_begin + params.num_groups + 1;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  if (threadIdx.x == kMathThreads) {
    TmaPrefetchMap(&weight_map);
    TmaPrefetchMap(&x_map);
    TmaPrefetchMap(&x_scale_map);
    const uint32_t base = SharedAddress(shared);
    for (int i = 0; i < params.stages; ++i) {
      MbarrierInit(base + at.full + i * 8, 1);
      MbarrierInit(base + at.empty + i * 8, kCluster * kMathThreads / 32);
    }
    FenceMbarrierInit();
  }
  LetNextBegin();
  if (params.group_offsets != nullptr) WaitForPrevious();
  if (warp == 0)
    FindGroups<kBlocks * kBlockRows>(params.group_offsets, params.num_groups, params.num_rows,
                                     params.n_tiles, tile_begin, row_begin);
  if constexpr (kCluster > 1) {
    ClusterSync();
  } else {
    __syncthreads();
  }

  if (warp >= kMathThreads / 32) {
    RegistersDown<40>();
    if (threadIdx.x == kMathThreads) {
      ProduceWeights<kBlocks, kCluster>(params, weight_map, SharedAddress(shared), at, tile_begin,
                                        row_begin);
    } else if (threadIdx.x == kMathThreads + 32) {
      ProduceX<kBlocks, kCluster>(params, x_map, x_scale_map, SharedAddress(shared), at, tile_begin,
                                  row_begin);
    } else {
      WaitForPrevious();
    }
  } else {
    RegistersUp<232>();
    WaitForPrevious();
    Multiply<kBlocks, kSwiglu, kCluster>(params, shared, at, tile_begin, row_begin, warp / 4);
  }
  if constexpr (kCluster > 1)
    ClusterSync();  // no block leaves while the other may still write or signal here
}

}  // namespace latentd::fp8_gemm_many_rows

#endif  // LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_MANY_ROWS_KERNEL_CUH_
