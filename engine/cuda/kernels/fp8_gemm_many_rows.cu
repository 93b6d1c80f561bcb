#include <algorithm>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/fp8_gemm_launch.h"
#include "engine/cuda/kernels/fp8_gemm_many_rows_kernel.cuh"

namespace latentd {
namespace {

using fp8_gemm_many_rows::kBlockRows;
using fp8_gemm_many_rows::kTileN;
using fp8_gemm_many_rows::Params;

constexpr int kSharedBytes = 227 * 1024;  // what a block may have on sm_90

template <int kBlocks, bool kSwiglu, int kCluster>
cudaError_t LaunchKernel(const Fp8GemmArgs& args, Params params, int blocks,
                         const Fp8GemmManyRowsTuning& tuning, cudaStream_t stream) {
  using L = fp8_gemm_many_rows::Layout<kBlocks>;
  const WeightMatrix& w = args.weight;
  const int most = (kSharedBytes - L(0, w.num_groups).total) / L::kStageBytes;
  params.stages = tuning.stages > 0 ? std::clamp(tuning.stages, 2, most) : most;
  params.n_tiles = (w.n + kTileN * kCluster - 1) / (kTileN * kCluster);

  fp8_gemm::Maps maps;
  if (!fp8_gemm::MakeMaps(
          args, {.weight = kTileN, .x = kBlockRows / kCluster, .x_scales = kBlocks * kBlockRows},
          maps))
    return cudaErrorInvalidValue;
  const int shared_bytes = L(params.stages, w.num_groups).total;
  const auto kernel = fp8_gemm_many_rows::Kernel<kBlocks, kSwiglu, kCluster>;
  // Always the same: another thread may be about to launch with another size.
  if (cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
      error != cudaSuccess)
    return error;
  const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks / kCluster * kCluster)),
                             .block = dim3(fp8_gemm_many_rows::kThreads),
                             .shared_bytes = static_cast<size_t>(shared_bytes),
                             .cluster = kCluster};
  return Launch(kernel, shape, stream, params, maps.weight, maps.x, maps.x_scales);
}

template <int kBlocks, int kCluster>
cudaError_t LaunchTile(const Fp8GemmArgs& args, const Params& params, int blocks,
                       const Fp8GemmManyRowsTuning& tuning, cudaStream_t stream) {
  return args.swiglu ? LaunchKernel<kBlocks, true, kCluster>(args, params, blocks, tuning, stream)
                     : LaunchKernel<kBlocks, false, kCluster>(args, params, blocks, tuning, stream);
}

}  // namespace

cudaError_t Fp8GemmManyRows(const Fp8GemmArgs& args, cudaStream_t stream) {
  return Fp8GemmManyRows(args, {}, stream);
}

cudaError_t Fp8GemmManyRows(const Fp8GemmArgs& args, const Fp8GemmManyRowsTuning& tuning,
                            cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (!fp8_gemm::Valid(args, fp8_gemm::kMaxGroups)) return cudaErrorInvalidValue;
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
  params.out = args.out;
  params.out_stride = args.out_stride;
  const bool pair = tuning.cluster != 1;
  if (tuning.row_tile == 128) {
    return pair ? LaunchTile<1, 2>(args, params, blocks, tuning, stream)
                : LaunchTile<1, 1>(args, params, blocks, tuning, stream);
  }
  return pair ? LaunchTile<2, 2>(args, params, blocks, tuning, stream)
              : LaunchTile<2, 1>(args, params, blocks, tuning, stream);
}

}  // namespace latentd
