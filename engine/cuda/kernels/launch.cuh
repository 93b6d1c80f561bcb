#ifndef LATENTD_ENGINE_CUDA_KERNELS_LAUNCH_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <utility>

namespace latentd {

// Programmatic dependent launch. Every kernel of ours is launched by Launch() and keeps three
// rules:
// - it calls WaitForPrevious() before it touches anything in global memory but constants (weights,
// tables): then the
//   previous kernel, and by the same rule all before it, have ended and their writes are seen;
// - it calls it in every thread block on every path, also where it has nothing to do;
// - it calls LetNextBegin() as early as it likes: that only lets the next kernel's blocks take free
// multiprocessors and
//   run up to their own WaitForPrevious().
__device__ __forceinline__ void WaitForPrevious() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void LetNextBegin() {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

struct LaunchShape {
  dim3 grid;
  dim3 block;
  size_t shared_bytes = 0;  // dynamic; over 48 KiB the caller has raised the kernel's limit
  int cluster = 1;          // thread blocks of a cluster, along x
};

template <typename... Params, typename... Args>
cudaError_t Launch(void (*kernel)(Params...), const LaunchShape& shape, cudaStream_t stream,
                   Args&&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = shape.grid;
  config.blockDim = shape.block;
  config.dynamicSmemBytes = shape.shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attributes;
  config.numAttrs = 1;
  if (shape.cluster > 1) {
    attributes[1].id = cudaLaunchAttributeClusterDimension;
    attributes[1].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[1].val.clusterDim.y = 1;
    attributes[1].val.clusterDim.z = 1;
    config.numAttrs = 2;
  }
  return cudaLaunchKernelEx(&config, kernel, std::forward<Args>(args)...);
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_LAUNCH_CUH_
