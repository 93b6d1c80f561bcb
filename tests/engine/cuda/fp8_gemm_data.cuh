#ifndef LATENTD_TESTS_ENGINE_CUDA_FP8_GEMM_DATA_CUH_
#define LATENTD_TESTS_ENGINE_CUDA_FP8_GEMM_DATA_CUH_

#include <cmath>
#include <cstdint>

#include "engine/cuda/kernels/tensors.h"

namespace latentd {

__host__ __device__ inline uint32_t Hash(uint64_t seed, uint64_t i) {
  uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull + seed * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 31)) * 0x94d049bb133111ebull;
  x = (x ^ (x >> 29)) * 0xbf58476d1ce4e5b9ull;
  return static_cast<uint32_t>(x >> 32);
}

// exact: small integers, whose products sum exactly in the tensor cores. Else: uniform in [-8, 8].
static __global__ void FillFp8(__nv_fp8_e4m3* data, int64_t size, uint64_t seed, bool exact) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t hash = Hash(seed, i);
    data[i] =
        __nv_fp8_e4m3(exact ? static_cast<int>(hash % 5) - 2.0f : (hash & 0xffff) / 4096.0f - 8.0f);
  }
}

// [rows, columns] of a matrix with `pitch`. exact: powers of two, 1/4 to 2. Else: 0.5 to 1.5 times
// `scale`.
static __global__ void FillScales(float* data, int64_t rows, int64_t columns, int64_t pitch,
                                  uint64_t seed, bool exact, float scale) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < rows * columns;
       i += int64_t{gridDim.x} * blockDim.x) {
    const uint32_t hash =
        Hash(seed, i / columns << 32 | i % columns);  // whatever the number of columns
    data[i / columns * pitch + i % columns] = exact ? ldexpf(1.0f, static_cast<int>(hash % 4) - 2)
                                                    : ((hash & 0xffff) / 65536.0f + 0.5f) * scale;
  }
}

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_FP8_GEMM_DATA_CUH_
