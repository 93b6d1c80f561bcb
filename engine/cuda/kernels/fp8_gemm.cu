#include <cuda.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/fp8_gemm_kernel.cuh"
#include "engine/cuda/kernels/fp8_gemm_launch.h"

namespace latentd {
namespace {

using fp8_gemm::kMaxCounters;
using fp8_gemm::kMaxGroups;
using fp8_gemm::kTileM;
using fp8_gemm::Params;

constexpr size_t kCounterBytes = kMaxCounters * sizeof(uint32_t);
constexpr size_t kPartialBytes = size_t{16} << 20;
constexpr int kMaxSegments = 8;
// Deep rings take in more of a matrix while the kernel before still runs; many groups stream a
// little faster from shallow ones.
constexpr int kStagesDense = 12, kStagesGrouped = 6;
constexpr int kSharedBytes = 227 * 1024;  // what a block may have on sm_90

// Segments of k (fp8_gemm_kernel.cuh): as many as let the tiles of all groups, with one tile of
// rows each, end on all multiprocessors at about the same time.
int ChooseSegments(const WeightMatrix& w, int blocks) {
  const int k_blocks = w.k / kQuantGroup;
  const int tiles = (w.n + kTileM - 1) / kTileM * w.num_groups;
  const int rest = tiles % blocks;
  int best = 1, best_cost = INT_MAX;
  // With many tiles the last wave is a small part, and more segments cost all of them.
  const int most = std::min(k_blocks, tiles < blocks ? kMaxSegments : 2);
  for (int segments = 1; segments <= most; ++segments) {
    // In tenths of the time of a stage on all multiprocessors. The last wave reads the rest of the
    // weights, no faster than a multiprocessor can alone; sums cost time to meet.
    const int pieces = (rest * segments + blocks - 1) / blocks;
    const int longest = std::min(k_blocks, pieces * ((k_blocks + segments - 1) / segments));
    const int cost = std::max(10 * rest * k_blocks / blocks, (tiles < blocks ? 7 : 5) * longest) +
                     (segments > 1 ? 30 * pieces + (tiles < blocks ? 5 : 10) * segments : 0);
    if (cost < best_cost) best = segments, best_cost = cost;
  }
  return best;
}

int RowsPerGroup(const Fp8GemmArgs& args) {
  if (args.rows_per_group_hint > 0) return args.rows_per_group_hint;
  return (args.num_rows + args.weight.num_groups - 1) / args.weight.num_groups;
}

int ChooseRowTile(const Fp8GemmArgs& args) {
  int rows = RowsPerGroup(args);
  // Groups are uneven: three standard deviations, were rows thrown at random. And their first tile
  // may begin up to three rows before them.
  if (args.group_offsets != nullptr)
    rows += 3 + static_cast<int>(3 * std::sqrt(static_cast<float>(rows)));
  for (int tile : {8, 16, 32, 64}) {
    if (rows <= tile) return tile;
  }
  return 128;
}

template <int kRows, bool kSwiglu, int kCluster>
cudaError_t LaunchKernel(const Fp8GemmArgs& args, Params params, int blocks,
                         const Fp8GemmTuning& tuning, cudaStream_t stream) {
  using L = fp8_gemm::Layout<kRows>;
  const WeightMatrix& w = args.weight;
  const int fixed_bytes = L(0, w.num_groups).total;
  params.stages = std::min(tuning.stages > 0               ? std::max(tuning.stages, 2)
                           : args.group_offsets != nullptr ? kStagesGrouped
                                                           : kStagesDense,
                           (kSharedBytes - fixed_bytes) / L::kStageBytes);
  const int rows_per_group = RowsPerGroup(args);
  // With fewer rows many groups are empty, and with more the first tiles are not those of the first
  // group.
  if (rows_per_group >= 4 && rows_per_group <= kRows)
    params.guess_blocks = std::min(params.k_blocks, params.stages);
  if (tuning.guess_blocks >= 0)
    params.guess_blocks = std::min(params.k_blocks, tuning.guess_blocks);
  params.m_tiles = (w.n + kTileM * kCluster - 1) / (kTileM * kCluster);
  params.partials = reinterpret_cast<float4*>(args.workspace + kCounterBytes);
  params.max_partials =
      static_cast<int>(kPartialBytes / (kRows * kTileM * kCluster * sizeof(float)));
  // Read once, unless the tiles of other rows soon read it again.
  params.weight_policy = rows_per_group <= kRows ? CachePolicy::kEvictFirst : CachePolicy::kNormal;

  fp8_gemm::Maps maps;
  if (!fp8_gemm::MakeMaps(args, {.weight = kTileM, .x = kRows / kCluster, .x_scales = kRows}, maps))
    return cudaErrorInvalidValue;

  const int shared_bytes = L(params.stages, w.num_groups).total;
  const auto kernel = fp8_gemm::Kernel<kRows, kSwiglu, kCluster>;
  // Always the same: another thread may be about to launch with another size.
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess)
    return error;
  const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks / kCluster * kCluster)),
                             .block = dim3(fp8_gemm::kThreads),
                             .shared_bytes = static_cast<size_t>(shared_bytes),
                             .cluster = kCluster};
  return Launch(kernel, shape, stream, params, maps.weight, maps.x, maps.x_scales);
}

template <int kRows, int kCluster = 1>
cudaError_t LaunchTile(const Fp8GemmArgs& args, const Params& params, int blocks,
                       const Fp8GemmTuning& tuning, cudaStream_t stream) {
  return args.swiglu ? LaunchKernel<kRows, true, kCluster>(args, params, blocks, tuning, stream)
                     : LaunchKernel<kRows, false, kCluster>(args, params, blocks, tuning, stream);
}

}  // namespace

size_t Fp8GemmWorkspaceBytes() { return kCounterBytes + kPartialBytes; }

cudaError_t Fp8Gemm(const Fp8GemmArgs& args, cudaStream_t stream) {
  return Fp8Gemm(args, {}, stream);
}

cudaError_t Fp8Gemm(const Fp8GemmArgs& args, const Fp8GemmTuning& tuning, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (!fp8_gemm::Valid(args, kMaxGroups) || args.workspace == nullptr) return cudaErrorInvalidValue;
  int device = 0, blocks = 0;
  if (cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device);
      error != cudaSuccess)
    return error;
  const WeightMatrix& w = args.weight;
  Params params = {};
  params.weight_scales = w.scales;
  params.weight_scale_stride = w.scale_stride;
  params.weight_scale_rows = (w.n + kQuantGroup - 1) / kQuantGroup;
  params.group_offsets = args.group_offsets;
  params.num_groups = w.num_groups;
  params.num_rows = args.num_rows;
  params.n = w.n;
  params.k_blocks = w.k / kQuantGroup;
  params.segments =
      tuning.segments > 0 ? std::min(tuning.segments, params.k_blocks) : ChooseSegments(w, blocks);
  params.out = args.out;
  params.out_stride = args.out_stride;
  params.counters = reinterpret_cast<uint32_t*>(args.workspace);
  switch (tuning.row_tile > 0 ? tuning.row_tile : ChooseRowTile(args)) {
    case 8:
      return LaunchTile<8>(args, params, blocks, tuning, stream);
    case 16:
      return LaunchTile<16>(args, params, blocks, tuning, stream);
    case 32:
      return LaunchTile<32>(args, params, blocks, tuning, stream);
    case 64:
      return LaunchTile<64>(args, params, blocks, tuning, stream);
    case 128:
      return tuning.cluster == 2 ? LaunchTile<128, 2>(args, params, blocks, tuning, stream)
                                 : LaunchTile<128, 1>(args, params, blocks, tuning, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace latentd
