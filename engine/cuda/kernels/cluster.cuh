#ifndef LATENTD_ENGINE_CUDA_KERNELS_CLUSTER_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_CLUSTER_CUH_

#include <cstdint>

#include "engine/cuda/kernels/ptx.cuh"

// Shared memory of the other thread blocks of a cluster. Who is read from must not end, nor write
// there again, before a barrier that the reader has reached.
namespace latentd {

// The two halves of ClusterSync(). Writes before the first are seen after the second. The first
// barrier of a kernel also tells that the other blocks have begun: nothing may be written into
// their memory before it.
__device__ __forceinline__ void ClusterArrive() {
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
__device__ __forceinline__ void ClusterWait() {
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}
__device__ __forceinline__ uint32_t RemoteAddress(const void* shared, uint32_t rank) {
  uint32_t address;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(address)
               : "r"(SharedAddress(shared)), "r"(rank));
  return address;
}
// *shared = value in block `rank` of the cluster.
__device__ __forceinline__ void StoreRemote(const uint32_t* shared, uint32_t rank, uint32_t value) {
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(RemoteAddress(shared, rank)), "r"(value)
               : "memory");
}
__device__ __forceinline__ void StoreRemote(const uint64_t* shared, uint32_t rank, uint64_t value) {
  asm volatile("st.shared::cluster.u64 [%0], %1;" ::"r"(RemoteAddress(shared, rank)), "l"(value)
               : "memory");
}
__device__ __forceinline__ uint32_t LoadRemote(const uint32_t* shared, uint32_t rank) {
  uint32_t value;
  asm volatile("ld.shared::cluster.u32 %0, [%1];"
               : "=r"(value)
               : "r"(RemoteAddress(shared, rank))
               : "memory");
  return value;
}

__device__ __forceinline__ uint64_t LoadRemote(const uint64_t* shared, uint32_t rank) {
  uint64_t value;
  asm volatile("ld.shared::cluster.u64 %0, [%1];"
               : "=l"(value)
               : "r"(RemoteAddress(shared, rank))
               : "memory");
  return value;
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_CLUSTER_CUH_
