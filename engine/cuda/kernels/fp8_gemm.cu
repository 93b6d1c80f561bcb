#include <cuda.h>

#include <algorithm>
#include <climits>
#include <cmath>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/fp8_gemm_kernel.cuh"

namespace latentd {
namespace {

using fp8_gemm::kMaxCounters;
using fp8_gemm::kMaxGroups;
using fp8_gemm::kTileK;
using fp8_gemm::kTileM;
using fp8_gemm::Params;

constexpr size_t kCounterBytes = kMaxCounters * sizeof(uint32_t);
constexpr size_t kPartialBytes = size_t{16} << 20;
constexpr int kMaxSegments = 8;
// Deep rings take in more of a matrix while the kernel before still runs; many groups stream a
// little faster from shallow ones.
constexpr int kStagesDense = 12, kStagesGrouped = 6;
constexpr int kSharedBytes = 227 * 1024;  // what a block may have on sm_90

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

// From the driver that is there at run time: the program is not linked to it.
EncodeTiled FindEncodeTiled() {
  static const EncodeTiled found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<EncodeTiled>(function);
  }();
  return found;
}

struct MapShape {
  int dims;
  cuuint64_t size[3];
  cuuint64_t pitch[2];  // bytes, of the second and third dimension
  cuuint32_t box[3];
};

bool MakeMap(const void* data, CUtensorMapDataType type, const MapShape& shape,
             CUtensorMapSwizzle swizzle, CUtensorMap& map) {
  const EncodeTiled encode = FindEncodeTiled();
  const cuuint32_t element_strides[3] = {1, 1, 1};
  return encode != nullptr &&
         encode(&map, type, shape.dims, const_cast<void*>(data), shape.size, shape.pitch, shape.box,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

bool Aligned16(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool Valid(const Fp8GemmArgs& args) {
  const WeightMatrix& w = args.weight;
  const int out_columns = args.swiglu ? w.n / 2 : w.n;
  return args.num_rows >= 0 && w.fp8 != nullptr && w.scales != nullptr && w.n > 0 &&
         w.n % 64 == 0 && w.k > 0 && w.k % kTileK == 0 && w.num_groups > 0 &&
         w.num_groups <= kMaxGroups && (w.num_groups == 1 || args.group_offsets != nullptr) &&
         w.scale_stride % 4 == 0 && w.scale_stride >= w.k / kTileK &&
         (!args.swiglu || w.n % (2 * kQuantGroup) == 0) && args.x.data != nullptr &&
         args.x.scales != nullptr && args.x.scale_stride % 4 == 0 &&
         args.x.scale_stride >= args.num_rows && args.out != nullptr && args.workspace != nullptr &&
         args.out_stride % 8 == 0 && args.out_stride >= out_columns && Aligned16(w.fp8) &&
         Aligned16(w.scales) && Aligned16(args.x.data) && Aligned16(args.x.scales) &&
         Aligned16(args.out);
}

// Segments of k (fp8_gemm_kernel.cuh): as many as let the tiles of all groups, with one tile of
// rows each, end on all multiprocessors at about the same time.
int ChooseSegments(const WeightMatrix& w, int blocks) {
  const int k_blocks = w.k / kTileK;
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

  CUtensorMap weight_map, x_map, x_scale_map;
  const auto n = static_cast<cuuint64_t>(w.n), k = static_cast<cuuint64_t>(w.k);
  const auto rows = static_cast<cuuint64_t>(args.num_rows);
  const MapShape weight_shape = {
      3, {k, n, static_cast<cuuint64_t>(w.num_groups)}, {k, k * n}, {kTileK, kTileM, 1}};
  const MapShape x_shape = {2, {k, rows}, {k}, {kTileK, kRows / kCluster}};
  const MapShape x_scale_shape = {2,
                                  {rows, k / kTileK},
                                  {static_cast<cuuint64_t>(args.x.scale_stride) * sizeof(float)},
                                  {kRows, 1}};
  if (!MakeMap(w.fp8, CU_TENSOR_MAP_DATA_TYPE_UINT8, weight_shape, CU_TENSOR_MAP_SWIZZLE_128B,
               weight_map) ||
      !MakeMap(args.x.data, CU_TENSOR_MAP_DATA_TYPE_UINT8, x_shape, CU_TENSOR_MAP_SWIZZLE_128B,
               x_map) ||
      !MakeMap(args.x.scales, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, x_scale_shape,
               CU_TENSOR_MAP_SWIZZLE_NONE, x_scale_map))
    return cudaErrorInvalidValue;

  const int shared_bytes = L(params.stages, w.num_groups).total;
  const auto kernel = fp8_gemm::Kernel<kRows, kSwiglu, kCluster>;
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
      error != cudaSuccess)
    return error;
  const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks / kCluster * kCluster)),
                             .block = dim3(fp8_gemm::kThreads),
                             .shared_bytes = static_cast<size_t>(shared_bytes),
                             .cluster = kCluster};
  return Launch(kernel, shape, stream, params, weight_map, x_map, x_scale_map);
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
  if (!Valid(args)) return cudaErrorInvalidValue;
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
  params.k_blocks = w.k / kTileK;
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
