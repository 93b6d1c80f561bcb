#ifndef LATENTD_ENGINE_CUDA_KERNELS_PTX_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_PTX_CUH_

#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

// Hopper's instructions that CUDA C++ has no name for, one function each. Addresses in shared
// memory are what SharedAddress() gives.
namespace latentd {

__device__ __forceinline__ uint32_t SharedAddress(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- mbarrier: a barrier in shared memory that also counts bytes that arrive by TMA. 8 bytes,
// 8-aligned.

__device__ __forceinline__ void MbarrierInit(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// After the inits, before the barrier that lets other threads (and TMA) use them.
__device__ __forceinline__ void FenceMbarrierInit() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void MbarrierArrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Arrives at a barrier of another thread block of the cluster.
__device__ __forceinline__ void MbarrierArriveRemote(uint32_t barrier, uint32_t cluster_rank) {
  asm volatile(
      "{ .reg .b32 remote; mapa.shared::cluster.u32 remote, %0, %1; "
      "mbarrier.arrive.shared::cluster.b64 _, [remote]; }" ::"r"(barrier),
      "r"(cluster_rank)
      : "memory");
}
// Arrives, and makes the phase wait for `bytes` more.
__device__ __forceinline__ void MbarrierArriveExpect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase of this parity: 0 for the first, 1 for the second, 0 for the
// third... A wait for parity 1 on a fresh barrier returns at once.
__device__ __forceinline__ void MbarrierWait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, "
        "p; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}

// --- TMA loads. Coordinates are elements, innermost first; what lies outside of the tensor arrives
// as zeros, and counts. The map must be a __grid_constant__ parameter of the kernel.

__device__ __forceinline__ void TmaPrefetchMap(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
__device__ __forceinline__ void TmaLoad2d(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                          int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, "
      "%4}], [%2];" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}
// `policy`: how the L2 cache treats what is loaded.
enum class CachePolicy : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12f0000000000000
};
__device__ __forceinline__ void TmaLoad3d(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                          int x, int y, int z, CachePolicy policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "l"(static_cast<uint64_t>(policy))
      : "memory");
}
// Into the L2 cache alone.
__device__ __forceinline__ void TmaPrefetch3d(const CUtensorMap* map, int x, int y, int z) {
  asm volatile("cp.async.bulk.prefetch.tensor.3d.L2.global.tile [%0, {%1, %2, %3}];" ::"l"(map),
               "r"(x), "r"(y), "r"(z)
               : "memory");
}
// To the same place in the shared memory of each thread block of the cluster whose bit is set in
// `blocks`; signals the same barrier of each.
__device__ __forceinline__ void TmaLoad2dMulticast(uint32_t to, const CUtensorMap* map,
                                                   uint32_t barrier, int x, int y,
                                                   uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], [%1, {%3, "
      "%4}], [%2], %5;" ::"r"(to),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(blocks)
      : "memory");
}
// `bytes`, a multiple of 16, from and to 16-aligned addresses.
__device__ __forceinline__ void BulkLoad(uint32_t to, const void* from, uint32_t bytes,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier)
      : "memory");
}

// --- Among thread blocks of the grid: what the threads of this block wrote before a barrier that
// this thread passed is seen by those that, in another block, pass a barrier after this thread's
// peer there got its value.
__device__ __forceinline__ uint32_t AtomicAddAcquireRelease(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

// --- Clusters of thread blocks.
__device__ __forceinline__ uint32_t ClusterRank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// All threads of all blocks of the cluster.
__device__ __forceinline__ void ClusterSync() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}

// --- Barriers among some warps of a block: `threads` of them, a multiple of 32; id 1 to 15 (0 is
// __syncthreads()).
__device__ __forceinline__ void NamedBarrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Orders this thread's ordinary writes to shared memory before what TMA and wgmma do there
// afterwards.
__device__ __forceinline__ void FenceProxyAsync() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- wgmma (128 threads). Fence before the first of a chain; the accumulators are the caller's
// again after the wait.
__device__ __forceinline__ void WgmmaFence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void WgmmaCommit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most `kPending` committed groups are under way.
template <int kPending>
__device__ __forceinline__ void WgmmaWait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// Keeps the compiler from moving or copying accumulators across the fence and the wait.
template <int kSize>
__device__ __forceinline__ void WgmmaPin(float (&d)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// A K-major operand whose rows are 128 bytes, swizzled by 128 bytes (as TMA writes it), 8 rows an
// atom of 1024 bytes; the tile begins at a multiple of 1024. Advance along K by adding bytes / 16
// to the descriptor.
__device__ __forceinline__ uint64_t WgmmaDescriptor(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kAtomStride = uint64_t{1024 / 16} << 32;
  return kSwizzle128 | kAtomStride | (uint64_t{1} << 16) | ((address & 0x3ffff) >> 4);
}

// --- Registers of a warpgroup; all its warps call it.
template <int kRegisters>
__device__ __forceinline__ void RegistersDown() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void RegistersUp() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- stmatrix: 8 x 8 matrices of 16-bit elements, transposed on the way: a thread holds column
// lane / 4 and rows 2 (lane % 4), + 1 of what arrives in memory. Lane i < 8 gives the address of
// row i of the first matrix, lane 8 + i of the second; 16-aligned.
__device__ __forceinline__ void StoreMatrixTransposed(uint32_t address, uint32_t a) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(address), "r"(a)
               : "memory");
}
__device__ __forceinline__ void StoreMatrixTransposed(uint32_t address, uint32_t a, uint32_t b) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(a), "r"(b)
               : "memory");
}
// Not transposed: a thread holds row lane / 4 and columns 2 (lane % 4), + 1 of each of four
// matrices; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void StoreMatrices(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                              uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_PTX_CUH_
