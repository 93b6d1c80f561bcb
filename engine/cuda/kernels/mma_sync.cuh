#ifndef LATENTD_ENGINE_CUDA_KERNELS_MMA_SYNC_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_MMA_SYNC_CUH_

#include <cstdint>

#include "engine/cuda/kernels/ptx.cuh"

// A warp's tensor core product and the copies that feed it: for work too small or too irregular for
// wgmma.
namespace latentd {

// d [16, 8] += a [16, 16] b [16, 8], bf16 with f32 sums. Lane = 4 * g + c holds of a the columns 2
// c, 2 c + 1 of row g (a0), of row g + 8 (a1), the columns 2 c + 8, + 9 of both (a2, a3); of b the
// rows 2 c, 2 c + 1 of column g (b0), the rows 2 c + 8, + 9 (b1); of d the columns 2 c, 2 c + 1 of
// row g (d[0], d[1]) and of row g + 8 (d[2], d[3]).
__device__ __forceinline__ void MmaBf16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                        uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// 16 bytes from global to shared memory, zeros where `valid` is false (then nothing is read).
__device__ __forceinline__ void CopyAsync16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void CopyAsyncCommit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `kPending` of this thread's committed groups are under way.
template <int kPending>
__device__ __forceinline__ void CopyAsyncWait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MMA_SYNC_CUH_
