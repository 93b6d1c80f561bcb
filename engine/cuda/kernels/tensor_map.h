#ifndef LATENTD_ENGINE_CUDA_KERNELS_TENSOR_MAP_H_
#define LATENTD_ENGINE_CUDA_KERNELS_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace latentd {

// What TMA knows of a tensor in global memory, innermost dimension first.
struct TensorMapShape {
  int dims;  // 2 or 3
  cuuint64_t size[3];
  cuuint64_t pitch[2];  // bytes, of the second and third dimension
  cuuint32_t box[3];    // what one load brings
};

// false: the driver has no such maps or refuses this one. The driver's function is looked for at
// run time: the program is not linked to it.
inline bool MakeTensorMap(const void* data, CUtensorMapDataType type, const TensorMapShape& shape,
                          CUtensorMapSwizzle swizzle, CUtensorMap& map) {
  using EncodeTiled = decltype(&cuTensorMapEncodeTiled);
  static const EncodeTiled encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &result) != cudaSuccess ||
        result != cudaDriverEntryPointSuccess)
      function = nullptr;
    return reinterpret_cast<EncodeTiled>(function);
  }();
  const cuuint32_t element_strides[3] = {1, 1, 1};
  return encode != nullptr &&
         encode(&map, type, shape.dims, const_cast<void*>(data), shape.size, shape.pitch, shape.box,
                element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_TENSOR_MAP_H_
