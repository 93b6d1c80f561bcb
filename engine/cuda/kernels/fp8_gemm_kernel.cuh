#ifndef LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_KERNEL_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_KERNEL_CUH_

#include <cuda_bf16.h>

#include <cstdint>

#include "engine/cuda/kernels/fp8_gemm_groups.cuh"
#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/ptx.cuh"
#include "engine/cuda/kernels/wgmma_fp8.cuh"

// The kernel behind fp8_gemm.h. A tile is 128 rows of a weight by kRows rows of x ("tokens"), all
// of k. A thread block, one a multiprocessor, works through tiles: two threads, one for weights and
// one for x and its scales, fill a ring of stages (128 of k) by TMA, two warpgroups multiply 64
// weight rows each. With kCluster 2 the blocks of a pair take neighbouring tiles of weights and the
// same of x, of which each loads one half for both: half of what many rows would read from L2.
//
// Order of sums. k is cut into `segments`, the same for every tile of a shape. Within a segment the
// products of 128 of k leave the tensor cores, are scaled and added in f32 one after the other;
// segments are summed in their order. So whoever computes a segment, the bits are the same, and the
// tiles that would fill the last wave only in part are handed out segment by segment: partial sums
// meet in the workspace, and the block that brings the last one adds them up.
namespace latentd::fp8_gemm {

inline constexpr int kTileM = 128;  // weight rows of a tile: two warpgroups of 64
inline constexpr int kTileK = 128;
inline constexpr int kMathThreads = 256;
inline constexpr int kThreads = kMathThreads + 128;
// Tiles of x that pass over the same weights before the next ones come.
inline constexpr int kTokenTilesTogether = 16;
inline constexpr int kMaxCounters = 1024;

struct Params {
  const float* weight_scales;  // [groups, weight_scale_rows, weight_scale_stride]
  int weight_scale_stride;
  int weight_scale_rows;
  const int32_t* group_offsets;  // nullptr: one group of num_rows
  int num_groups;
  int num_rows;
  int n;
  int k_blocks;
  int m_tiles;  // of kCluster tiles each
  int segments;
  int stages;
  CachePolicy weight_policy;
  int guess_blocks;  // of k, of the tile that a grouped call begins with if no group is empty
  __nv_bfloat16* out;
  int64_t out_stride;
  uint32_t* counters;  // [2 * tiles of the last wave], zero between calls
  float4* partials;
  int max_partials;  // of kCluster tiles each, that `partials` holds
};

// Offsets into shared memory.
template <int kRows>
struct Layout {
  static constexpr int kWeightBytes = kTileM * kTileK;
  static constexpr int kXBytes = kRows * kTileK;
  static constexpr int kXScaleBytes = kRows * 4;
  static constexpr int kXScalePitch = kRows * 4 < 128 ? 128 : kRows * 4;
  // Of a token: 64 features; the rest keeps off bank conflicts.
  static constexpr int kOutPitch = 64 * 2 + 16;
  static constexpr int kStageBytes = kWeightBytes + kXBytes + kXScalePitch + 2 * 8;
  static constexpr int kOutBytes = 2 * kRows * kOutPitch;

  int x, x_scales, out, full, empty, counts, groups, total;

  __host__ __device__ Layout(int stages, int num_groups) {
    x = stages * kWeightBytes;
    x_scales = x + stages * kXBytes;
    out = x_scales + stages * kXScalePitch;
    full = out + kOutBytes;
    empty = full + stages * 8;
    counts = empty + stages * 8;
    groups = counts + 2 * 4;
    total = groups + 2 * (num_groups + 1) * 4;
  }
};

// A piece of work: the segments [segment_begin, segment_end) of a tile.
struct Work {
  int group;
  int m_tile;              // the block's own
  int row;                 // of x where the tile begins
  int row_begin, row_end;  // those of them that are the group's
  int segment_begin, segment_end;
  int split;  // -1, or which of the tiles (pairs of them, in a cluster) that are cut into segments
};

// Walks over this block's work. All roles walk the same way.
template <int kRows, int kCluster>
class Walk {
 public:
  // tile_begin, row_begin [num_groups + 1]: where each group's tiles and rows begin.
  __device__ __forceinline__ Walk(const Params& params, const int* tile_begin, const int* row_begin)
      : params_(params),
        tile_begin_(tile_begin),
        row_begin_(row_begin),
        unit_(blockIdx.x / kCluster) {
    num_tiles_ = tile_begin[params.num_groups];
    const int blocks = gridDim.x / kCluster, segments = params.segments;
    const int rest = num_tiles_ % blocks;
    const int most =
        (rest * segments + blocks - 1) / blocks;  // segments of one block in the last wave
    const bool split = rest * segments <= params.max_partials &&
                       2 * kCluster * rest <= kMaxCounters &&
                       most * ((params.k_blocks + segments - 1) / segments) < params.k_blocks;
    whole_tiles_ = split ? num_tiles_ - rest : num_tiles_;
  }

  __device__ __forceinline__ bool Next(Work& work) {
    int tile = unit_;
    work.segment_begin = 0;
    work.segment_end = params_.segments;
    work.split = -1;
    if (tile >= whole_tiles_) {
      const int piece = unit_ - whole_tiles_;
      work.split = piece / params_.segments;
      work.segment_begin = piece - work.split * params_.segments;
      work.segment_end = work.segment_begin + 1;
      tile = whole_tiles_ + work.split;
      if (tile >= num_tiles_) return false;
    }
    unit_ += gridDim.x / kCluster;
    while (tile_begin_[group_ + 1] <= tile) ++group_;
    tile -= tile_begin_[group_];
    work.group = group_;
    const int group_begin = row_begin_[group_], group_end = row_begin_[group_ + 1];
    const int first_row = FirstRow(group_begin);
    const int token_tiles = (group_end - first_row + kRows - 1) / kRows;
    const int band = tile / (kTokenTilesTogether * params_.m_tiles);
    const int in_band = tile - band * kTokenTilesTogether * params_.m_tiles;
    const int width = min(kTokenTilesTogether, token_tiles - band * kTokenTilesTogether);
    const int m_tile = in_band / width;
    work.m_tile = m_tile * kCluster + static_cast<int>(blockIdx.x % kCluster);
    const int token_tile = band * kTokenTilesTogether + in_band - m_tile * width;
    work.row = first_row + token_tile * kRows;
    work.row_begin = max(work.row, group_begin);
    work.row_end = min(work.row + kRows, group_end);
    return true;
  }

  __device__ __forceinline__ int FirstBlock(int segment) const {
    return segment * params_.k_blocks / params_.segments;
  }

 private:
  const Params& params_;
  const int* const tile_begin_;
  const int* const row_begin_;
  int num_tiles_, whole_tiles_;
  int unit_;
  int group_ = 0;
};

// Calls load(work, block, stage) for each 128 of k of this block's work, once its stage is free.
template <int kRows, int kCluster, typename Load>
__device__ __forceinline__ void Produce(const Params& p, uint32_t empty, const int* tile_begin,
                                        const int* row_begin, Load load) {
  Walk<kRows, kCluster> walk(p, tile_begin, row_begin);
  Work work;
  int stage = 0;
  uint32_t parity = 1;
  while (walk.Next(work)) {
    const int end = walk.FirstBlock(work.segment_end);
    for (int block = walk.FirstBlock(work.segment_begin); block < end; ++block) {
      MbarrierWait(empty + stage * 8, parity);
      load(work, block, stage);
      if (++stage == p.stages) {
        stage = 0;
        parity ^= 1;
      }
    }
  }
}

// One thread. Weights are constant: they come while the previous kernel still runs.
template <int kRows, int kCluster>
__device__ __forceinline__ void ProduceWeights(const Params& p, const CUtensorMap& weight_map,
                                               uint32_t shared, const Layout<kRows>& at,
                                               const int* tile_begin, const int* row_begin) {
  using L = Layout<kRows>;
  Produce<kRows, kCluster>(
      p, shared + at.empty, tile_begin, row_begin, [&](const Work& work, int block, int stage) {
        const uint32_t full = shared + at.full + stage * 8;
        MbarrierArriveExpect(full, L::kWeightBytes + L::kXBytes + L::kXScaleBytes);
        TmaLoad3d(shared + stage * L::kWeightBytes, &weight_map, full, block * kTileK,
                  work.m_tile * kTileM, work.group, p.weight_policy);
      });
}

// One thread.
template <int kRows, int kCluster>
__device__ __forceinline__ void ProduceX(const Params& p, const CUtensorMap& x_map,
                                         const CUtensorMap& x_scale_map, uint32_t shared,
                                         const Layout<kRows>& at, const int* tile_begin,
                                         const int* row_begin) {
  using L = Layout<kRows>;
  WaitForPrevious();
  Produce<kRows, kCluster>(
      p, shared + at.empty, tile_begin, row_begin, [&](const Work& work, int block, int stage) {
        const uint32_t full = shared + at.full + stage * 8;
        const uint32_t to = shared + at.x + stage * L::kXBytes;
        if constexpr (kCluster == 1) {
          TmaLoad2d(to, &x_map, full, block * kTileK, work.row);
        } else {
          const int part = static_cast<int>(blockIdx.x % kCluster);
          TmaLoad2dMulticast(to + part * (L::kXBytes / kCluster), &x_map, full, block * kTileK,
                             work.row + part * (kRows / kCluster), (1 << kCluster) - 1);
        }
        TmaLoad2d(shared + at.x_scales + stage * L::kXScalePitch, &x_scale_map, full, work.row,
                  block);
      });
}

// Sums of a tile's segments computed by several blocks. Each stores its own; true for the one that
// comes last, with the whole sum in `sum`. One warpgroup, half a tile.
template <int kRows, int kCluster>
__device__ __forceinline__ bool SumSegments(const Params& p, const Work& work, int half, int thread,
                                            float (&sum)[kRows / 2],
                                            volatile uint32_t* shared_count) {
  constexpr int kVectors = kRows / 8;
  const int split = work.split * kCluster + static_cast<int>(blockIdx.x % kCluster);
  auto address = [&](int segment, int i) {
    const int64_t tile = split * p.segments + segment;
    return p.partials + ((tile * 2 + half) * kVectors + i) * 128 + thread;
  };
#pragma unroll
  for (int i = 0; i < kVectors; ++i)
    __stcg(address(work.segment_begin, i),
           make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]));
  NamedBarrier(1 + half, 128);
  uint32_t* counter = p.counters + split * 2 + half;
  if (thread == 0) {
    *shared_count = AtomicAddAcquireRelease(counter, 1);
    if (*shared_count == static_cast<uint32_t>(p.segments - 1)) *counter = 0;
  }
  NamedBarrier(1 + half, 128);
  if (*shared_count != static_cast<uint32_t>(p.segments - 1)) return false;
  // Many loads under way together: several segments' or many of one.
  constexpr int kTogether = kVectors >= 16 ? 1 : 16 / kVectors;
  constexpr int kLoads = kVectors > 8 ? 8 : kVectors;
#pragma unroll
  for (int i = 0; i < kRows / 2; ++i) sum[i] = 0;
  for (int first = 0; first < p.segments; first += kTogether) {
#pragma unroll
    for (int i = 0; i < kVectors; i += kLoads) {
      float4 v[kTogether][kLoads];
#pragma unroll
      for (int j = 0; j < kTogether * kLoads; ++j)
        v[j / kLoads][j % kLoads] = first + j / kLoads < p.segments
                                        ? __ldcg(address(first + j / kLoads, i + j % kLoads))
                                        : make_float4(0, 0, 0, 0);
#pragma unroll
      for (int j = 0; j < kTogether * kLoads; ++j) {
        const float4 add = v[j / kLoads][j % kLoads];
        float* to = sum + 4 * (i + j % kLoads);
        to[0] += add.x, to[1] += add.y, to[2] += add.z, to[3] += add.w;
      }
    }
  }
  return true;
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ float SiluTimes(float gate, float up) {
  return gate / (1.0f + __expf(-gate)) * up;
}

// Half a tile of sums to bf16 rows of `out`, through shared memory so that stores are 16 bytes a
// thread.
template <int kRows, bool kSwiglu>
__device__ __forceinline__ void Store(const Params& p, const Work& work, int half, int thread,
                                      const float (&sum)[kRows / 2], unsigned char* staging) {
  using L = Layout<kRows>;
  constexpr int kFeatures = kSwiglu ? 32 : 64;  // of half a tile
  const int lane = thread % 32, warp = thread / 32;
  const uint32_t to = SharedAddress(staging) + lane % 8 * L::kOutPitch;
  NamedBarrier(1 + half, 128);  // the tile before has left the staging area
#pragma unroll
  for (int i = 0; i < kRows / 8; ++i) {
    const uint32_t row = to + i * 8 * L::kOutPitch;
    if constexpr (kSwiglu) {
      StoreMatrixTransposed(row + warp * 16, PackBf16(SiluTimes(sum[4 * i], sum[4 * i + 2]),
                                                      SiluTimes(sum[4 * i + 1], sum[4 * i + 3])));
    } else {
      StoreMatrixTransposed(row + warp * 32 + lane / 8 % 2 * 16,
                            PackBf16(sum[4 * i], sum[4 * i + 1]),
                            PackBf16(sum[4 * i + 2], sum[4 * i + 3]));
    }
  }
  NamedBarrier(1 + half, 128);
  if (work.m_tile * kTileM + half * 64 >= p.n) return;
  constexpr int kChunks = kFeatures / 8;
  const int chunk = thread % kChunks;
  __nv_bfloat16* out = p.out + (work.m_tile * 2 + half) * kFeatures + chunk * 8;
  for (int row = work.row_begin + thread / kChunks; row < work.row_end; row += 128 / kChunks)
    *reinterpret_cast<uint4*>(out + row * p.out_stride) =
        *reinterpret_cast<const uint4*>(staging + (row - work.row) * L::kOutPitch + chunk * 16);
}

// One warpgroup: `half` of each tile's weight rows.
template <int kRows, bool kSwiglu, int kCluster>
__device__ __forceinline__ void Multiply(const Params& p, unsigned char* shared,
                                         const Layout<kRows>& at, const int* tile_begin,
                                         const int* row_begin, int half) {
  using L = Layout<kRows>;
  const int thread = threadIdx.x % 128, lane = thread % 32;
  const uint32_t base = SharedAddress(shared);
  unsigned char* const staging = shared + at.out + half * kRows * L::kOutPitch;
  uint32_t* const shared_count = reinterpret_cast<uint32_t*>(shared + at.counts) + half;
  int stage = 0;
  uint32_t parity = 0;
  Walk<kRows, kCluster> walk(p, tile_begin, row_begin);
  Work work;
  while (walk.Next(work)) {
    // SwiGLU: 64 rows of gate and 64 of up, whose blocks of 128 are apart. The last block of a
    // cluster may have no rows of the weights.
    const int scale_row = min(kSwiglu ? work.m_tile / 2 : work.m_tile, p.weight_scale_rows - 1);
    const float* low_scales =
        p.weight_scales + (static_cast<int64_t>(work.group) * p.weight_scale_rows + scale_row) *
                              p.weight_scale_stride;
    const float* high_scales =
        low_scales + static_cast<int64_t>(p.weight_scale_rows / 2) * p.weight_scale_stride;
    float sum[kRows / 2], total[kRows / 2];
    for (int segment = work.segment_begin; segment < work.segment_end; ++segment) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) sum[i] = 0;
      const int end = walk.FirstBlock(segment + 1);
      for (int block = walk.FirstBlock(segment); block < end; ++block) {
        MbarrierWait(base + at.full + stage * 8, parity);
        float products[kRows / 2];
        const uint64_t a = WgmmaDescriptor(base + stage * L::kWeightBytes + half * 64 * kTileK);
        const uint64_t b = WgmmaDescriptor(base + at.x + stage * L::kXBytes);
        WgmmaPin(products);
        WgmmaFence();
#pragma unroll
        for (int i = 0; i < kTileK / 32; ++i)
          WgmmaFp8<kRows>::Run(products, a + i * 2, b + i * 2, i != 0);
        WgmmaCommit();
        const float low_scale = __ldg(low_scales + block);
        const float high_scale = kSwiglu ? __ldg(high_scales + block) : low_scale;
        const float2* x_scale =
            reinterpret_cast<const float2*>(shared + at.x_scales + stage * L::kXScalePitch) +
            lane % 4;
        WgmmaPin(products);
        WgmmaWait<0>();
        WgmmaPin(products);
#pragma unroll
        for (int i = 0; i < kRows / 8; ++i) {
          const float2 scale = x_scale[i * 4];
          sum[4 * i] = __fmaf_rn(products[4 * i], __fmul_rn(low_scale, scale.x), sum[4 * i]);
          sum[4 * i + 1] =
              __fmaf_rn(products[4 * i + 1], __fmul_rn(low_scale, scale.y), sum[4 * i + 1]);
          sum[4 * i + 2] =
              __fmaf_rn(products[4 * i + 2], __fmul_rn(high_scale, scale.x), sum[4 * i + 2]);
          sum[4 * i + 3] =
              __fmaf_rn(products[4 * i + 3], __fmul_rn(high_scale, scale.y), sum[4 * i + 3]);
        }
        __syncwarp();
        if constexpr (kCluster == 1) {
          if (lane == 0) MbarrierArrive(base + at.empty + stage * 8);
        } else {
          if (lane < kCluster) MbarrierArriveRemote(base + at.empty + stage * 8, lane);
        }
        if (++stage == p.stages) {
          stage = 0;
          parity ^= 1;
        }
      }
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i)
        total[i] = segment == work.segment_begin ? sum[i] : total[i] + sum[i];
    }
    if (work.split >= 0 &&
        !SumSegments<kRows, kCluster>(p, work, half, thread, total, shared_count))
      continue;
    Store<kRows, kSwiglu>(p, work, half, thread, total, staging);
  }
}

template <int kRows, bool kSwiglu, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    Kernel(const Params params, const __grid_constant__ CUtensorMap weight_map,
           const __grid_constant__ CUtensorMap x_map,
           const __grid_constant__ CUtensorMap x_scale_map) {
  extern __shared__ __align__(1024) unsigned char shared[];
  const Layout<kRows> at(params.stages, params.num_groups);
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
  if (params.group_offsets != nullptr) {
    // Which tiles there are is not known yet, but likely: let those weights come to L2 meanwhile.
    if (threadIdx.x == kMathThreads) {
      const int m_tiles = params.m_tiles * kCluster, group = static_cast<int>(blockIdx.x) / m_tiles;
      for (int block = 0; block < params.guess_blocks && group < params.num_groups; ++block)
        TmaPrefetch3d(&weight_map, block * kTileK, static_cast<int>(blockIdx.x) % m_tiles * kTileM,
                      group);
    }
    WaitForPrevious();
  }
  if (warp == 0)
    FindGroups<kRows>(params.group_offsets, params.num_groups, params.num_rows, params.m_tiles,
                      tile_begin, row_begin);
  if constexpr (kCluster > 1) {
    ClusterSync();
  } else {
    __syncthreads();
  }

  if (warp >= kMathThreads / 32) {
    RegistersDown<40>();
    if (threadIdx.x == kMathThreads) {
      ProduceWeights<kRows, kCluster>(params, weight_map, SharedAddress(shared), at, tile_begin,
                                      row_begin);
    } else if (threadIdx.x == kMathThreads + 32) {
      ProduceX<kRows, kCluster>(params, x_map, x_scale_map, SharedAddress(shared), at, tile_begin,
                                row_begin);
    } else {
      WaitForPrevious();
    }
  } else {
    RegistersUp<232>();
    WaitForPrevious();
    Multiply<kRows, kSwiglu, kCluster>(params, shared, at, tile_begin, row_begin, warp / 4);
  }
  if constexpr (kCluster > 1)
    ClusterSync();  // no block leaves while the other may still write or signal here
}

}  // namespace latentd::fp8_gemm

#endif  // LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_KERNEL_CUH_
