#include <cuda.h>

#include <algorithm>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mla_decode.h"
#include "engine/cuda/kernels/mla_decode_load.cuh"
#include "engine/cuda/kernels/mla_decode_scores.cuh"
#include "engine/cuda/kernels/mla_decode_values.cuh"
#include "engine/cuda/kernels/mla_merge.cuh"

// A thread block attends with 64 rows at a time to 64 keys at a time, in four warpgroups:
//
// - producer: brings the cache's blocks in tiles of 64 x 64: by TMA, or from FP8, widened to bf16;
// - scores: S = Q K^T as the tiles land, softmax, P as bf16 into one of two buffers;
// - values, two of them: each O[64, 256] += P V[64, 256], half of the columns, in registers;
//
// so that the scores of one block, and their softmax, run beside the values of the block before. K
// and V are the same bytes of shared memory. Queries lie in shared memory but for the last
// kRegisterTiles tiles of 64 columns, which the scores' warpgroup holds in registers.
//
// Rows' maxima are raised only when they have grown by more than 2^kMaxSlack: P stays far from
// bf16's and f32's limits, and O is seldom rescaled.
namespace latentd {

using namespace mla_decode;  // NOLINT(google-build-using-namespace)

namespace {

template <bool kFp8>
struct Registers {  // of a thread of each role; a multiprocessor's are 4 warpgroups times 128
  static constexpr int kProducer = kFp8 ? 80 : 32;
  static constexpr int kScores = kFp8 ? 112 : 144;
  static constexpr int kValues = kFp8 ? 160 : 168;
  static_assert(kProducer + kScores + 2 * kValues <= 512);
};

template <int kRegisters>
__device__ __forceinline__ void SetScoresRegisters() {
  if constexpr (kRegisters < 128) {
    RegistersDown<kRegisters>();
  } else {
    RegistersUp<kRegisters>();
  }
}

template <bool kFp8>
__global__ void __launch_bounds__(kThreads, 1)
    MlaDecodeKernel(const __grid_constant__ CUtensorMap map, const Params params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  Shared& shared = *reinterpret_cast<Shared*>(storage);
  if (threadIdx.x == 0) {
    TmaPrefetchMap(&map);
    constexpr int kReaders = 4;  // warps
    for (int s = 0; s < kQuarterSlots; ++s) {
      MbarrierInit(SharedAddress(&shared.quarter_full[s]), kFp8 ? 4 : 1);
      MbarrierInit(SharedAddress(&shared.quarter_empty[s]), kReaders);
    }
    for (int s = 0; s < kRopeSlots; ++s) {
      MbarrierInit(SharedAddress(&shared.rope_full[s]), kFp8 ? kKeys : 1);
      MbarrierInit(SharedAddress(&shared.rope_empty[s]), kFp8 ? kWarpgroup : kReaders);
    }
    for (int i = 0; i < 2; ++i) {
      MbarrierInit(SharedAddress(&shared.p_full[i]), kWarpgroup);
      MbarrierInit(SharedAddress(&shared.p_empty[i]), 2 * kWarpgroup);
    }
    MbarrierInit(SharedAddress(&shared.end_full), kWarpgroup);
    MbarrierInit(SharedAddress(&shared.end_empty), 8);
    FenceMbarrierInit();
  }
  __syncthreads();
  WaitForPrevious();
  LetNextBegin();
  const int role = threadIdx.x / kWarpgroup;
  if (role == kProducer) {
    RegistersDown<Registers<kFp8>::kProducer>();
    if constexpr (kFp8) {
      WidenBlocks(shared, params, &map);
    } else if (threadIdx.x == 0) {
      LoadBlocks(shared, params, &map);
    }
  } else if (role == kScores) {
    SetScoresRegisters<Registers<kFp8>::kScores>();
    Score<kFp8>(shared, params);
  } else {
    RegistersUp<Registers<kFp8>::kValues>();
    Accumulate(shared, params, role - kLeftValues);
  }
}

// Bf16: the cache as rows of 576. FP8: the rotated dims, [blocks, 64, 64]. Both have as many as
// coordinates reach: what the block tables name is what exists.
cudaError_t EncodeCache(const MlaCache& cache, CUtensorMap* map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      function = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const bool fp8 = cache.format == CacheFormat::kFp8;
  const cuuint64_t block_bytes = MlaCacheBlockBytes(cache.format);
  const cuuint64_t fp8_dims[3] = {kMlaRopeDim, kKeys, uint64_t{1} << 25};
  const cuuint64_t bf16_dims[2] = {kKeyDim, uint64_t{1} << 31};
  const cuuint64_t fp8_strides[2] = {kMlaRopeDim * sizeof(__nv_bfloat16), block_bytes};
  const cuuint64_t bf16_strides[1] = {block_bytes / kKeys};
  const cuuint32_t box[3] = {64, kKeys, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, fp8 ? 3 : 2,
             cache.data + (fp8 ? kMlaFp8RopeOffset : 0), fp8 ? fp8_dims : bf16_dims,
             fp8 ? fp8_strides : bf16_strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

template <bool kFp8>
cudaError_t LaunchDecode(const CUtensorMap& map, const Params& params, int num_sms,
                         cudaStream_t stream) {
  const auto kernel = MlaDecodeKernel<kFp8>;
  static const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (allowed != cudaSuccess) return allowed;
  LaunchShape shape;
  const int tiles = MlaTilesPerUnit(params.num_heads);
  shape.grid = dim3(std::max(num_sms / tiles, 1) * tiles);
  shape.block = dim3(kThreads);
  shape.shared_bytes = sizeof(Shared);
  return Launch(kernel, shape, stream, map, params);
}

// The rows of units in parts; nothing is left to do where there are none.
cudaError_t LaunchMerge(const Params& params, int num_sms, cudaStream_t stream) {
  LaunchShape shape;
  shape.grid = dim3(2 * num_sms);
  shape.block = dim3(kMergeWarps * 32);
  return Launch(MlaMergeKernel, shape, stream, params.plan, params.workspace, params.num_heads,
                params.out);
}

}  // namespace

cudaError_t MlaDecode(const MlaDecodeArgs& args, cudaStream_t stream) {
  if (args.q == nullptr || args.cache.data == nullptr || args.cache.format == CacheFormat::kF32 ||
      args.blocks == nullptr || args.block_begin == nullptr || args.plan == nullptr ||
      args.workspace == nullptr || args.out == nullptr || args.num_heads <= 0 ||
      !(args.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  CUtensorMap map;
  if (error == cudaSuccess) error = EncodeCache(args.cache, &map);
  if (error != cudaSuccess) return error;
  constexpr float kLog2E = 1.44269504088896341f;
  const Params params = {
      args.cache.data, args.q,         args.blocks,    args.block_begin,
      args.plan,       args.workspace, args.num_heads, args.softmax_scale * kLog2E,
      args.out};
  error = args.cache.format == CacheFormat::kFp8
              ? LaunchDecode<true>(map, params, num_sms, stream)
              : LaunchDecode<false>(map, params, num_sms, stream);
  return error == cudaSuccess ? LaunchMerge(params, num_sms, stream) : error;
}

}  // namespace latentd
