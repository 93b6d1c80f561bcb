#ifndef LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_LAUNCH_H_
#define LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_LAUNCH_H_

#include <cuda.h>

#include <cstdint>

#include "engine/cuda/kernels/fp8_gemm.h"
#include "engine/cuda/kernels/tensor_map.h"

// What the launchers behind fp8_gemm.h share.
namespace latentd::fp8_gemm {

inline bool Aligned16(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

// Whether the arguments are those of a product, but for its workspace.
inline bool Valid(const Fp8GemmArgs& args, int max_groups) {
  const WeightMatrix& w = args.weight;
  const int out_columns = args.swiglu ? w.n / 2 : w.n;
  return args.num_rows >= 0 && w.fp8 != nullptr && w.scales != nullptr && w.n > 0 &&
         w.n % 64 == 0 && w.k > 0 && w.k % kQuantGroup == 0 && w.num_groups > 0 &&
         w.num_groups <= max_groups && (w.num_groups == 1 || args.group_offsets != nullptr) &&
         w.scale_stride % 4 == 0 && w.scale_stride >= w.k / kQuantGroup &&
         (!args.swiglu || w.n % (2 * kQuantGroup) == 0) && args.x.data != nullptr &&
         args.x.scales != nullptr && args.x.scale_stride % 4 == 0 &&
         args.x.scale_stride >= args.num_rows && args.out != nullptr && args.out_stride % 8 == 0 &&
         args.out_stride >= out_columns && Aligned16(w.fp8) && Aligned16(w.scales) &&
         Aligned16(args.x.data) && Aligned16(args.x.scales) && Aligned16(args.out);
}

// Of 128 of k: rows that one load brings.
struct LoadRows {
  int weight;
  int x;
  int x_scales;
};

struct Maps {
  CUtensorMap weight, x, x_scales;
};

inline bool MakeMaps(const Fp8GemmArgs& args, const LoadRows& load, Maps& maps) {
  const WeightMatrix& w = args.weight;
  const auto n = static_cast<cuuint64_t>(w.n), k = static_cast<cuuint64_t>(w.k);
  const auto rows = static_cast<cuuint64_t>(args.num_rows);
  const auto box = [](int size) { return static_cast<cuuint32_t>(size); };
  const TensorMapShape weight = {3,
                                 {k, n, static_cast<cuuint64_t>(w.num_groups)},
                                 {k, k * n},
                                 {kQuantGroup, box(load.weight), 1}};
  const TensorMapShape x = {2, {k, rows}, {k}, {kQuantGroup, box(load.x)}};
  const TensorMapShape x_scales = {2,
                                   {rows, k / kQuantGroup},
                                   {static_cast<cuuint64_t>(args.x.scale_stride) * sizeof(float)},
                                   {box(load.x_scales), 1}};
  return MakeTensorMap(w.fp8, CU_TENSOR_MAP_DATA_TYPE_UINT8, weight, CU_TENSOR_MAP_SWIZZLE_128B,
                       maps.weight) &&
         MakeTensorMap(args.x.data, CU_TENSOR_MAP_DATA_TYPE_UINT8, x, CU_TENSOR_MAP_SWIZZLE_128B,
                       maps.x) &&
         MakeTensorMap(args.x.scales, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, x_scales,
                       CU_TENSOR_MAP_SWIZZLE_NONE, maps.x_scales);
}

}  // namespace latentd::fp8_gemm

#endif  // LATENTD_ENGINE_CUDA_KERNELS_FP8_GEMM_LAUNCH_H_
