#include <algorithm>
#include <limits>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/random_fill.h"
#include "engine/model/dummy_hash.h"

namespace latentd {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 132 * 16;

// kVector neighbours of a row at once: 8, one hash, when rows of both sides are whole eights,
// else 1.
template <typename T, int kVector>
__global__ void __launch_bounds__(kThreads) RandomFillKernel(RandomFillArgs args) {
  __shared__ T values[256];
  static_assert(kThreads == 256);
  values[threadIdx.x] = static_cast<const T*>(args.values)[threadIdx.x];
  WaitForPrevious();
  LetNextBegin();
  __syncthreads();

  const auto per_row = static_cast<uint32_t>(args.num_cols / kVector);
  const auto count = static_cast<uint32_t>(args.num_rows) * per_row;
  const auto block_rows = static_cast<uint32_t>(args.block_rows);
  const uint32_t step = gridDim.x * kThreads;
  for (uint64_t i = blockIdx.x * kThreads + threadIdx.x; i < count; i += step) {
    const uint32_t row = static_cast<uint32_t>(i) / per_row;
    const int64_t col = int64_t{static_cast<uint32_t>(i) % per_row} * kVector;
    const int64_t block = row / block_rows, in_block = row % block_rows;
    const int64_t source_row = args.row_begin + block * args.source_block_rows + in_block;
    const auto element =
        static_cast<uint64_t>(source_row * args.source_cols + args.col_begin + col);
    const uint64_t bytes = DummyHash(args.tensor, element & ~uint64_t{7});
    T* out = static_cast<T*>(args.target) +
             (block * args.target_block_rows + in_block) * args.target_cols + col;
    if constexpr (kVector == 1) {
      *out = values[(bytes >> (element % 8 * 8)) & 0xff];
    } else {
      constexpr int kStoreBytes = sizeof(T) * kVector < 16 ? sizeof(T) * kVector : 16;
      struct alignas(kStoreBytes) Store {
        T values[kStoreBytes / sizeof(T)];
      };
      constexpr int kPerStore = kStoreBytes / sizeof(T);
#pragma unroll
      for (int first = 0; first < kVector; first += kPerStore) {
        Store store;
#pragma unroll
        for (int j = 0; j < kPerStore; ++j)
          store.values[j] = values[(bytes >> ((first + j) * 8)) & 0xff];
        *reinterpret_cast<Store*>(out + first) = store;
      }
    }
  }
}

template <typename T>
cudaError_t Fill(const RandomFillArgs& args, cudaStream_t stream) {
  const bool eights = args.num_cols % 8 == 0 && args.source_cols % 8 == 0 &&
                      args.col_begin % 8 == 0 && args.target_cols % 8 == 0;
  const int64_t count = args.num_rows * args.num_cols / (eights ? 8 : 1);
  if (count == 0) return cudaSuccess;
  if (count > std::numeric_limits<uint32_t>::max()) return cudaErrorInvalidValue;
  const int64_t blocks = std::min((count + kThreads - 1) / kThreads, kMaxBlocks);
  const LaunchShape shape = {.grid = dim3(static_cast<unsigned>(blocks)), .block = dim3(kThreads)};
  return eights ? Launch(RandomFillKernel<T, 8>, shape, stream, args)
                : Launch(RandomFillKernel<T, 1>, shape, stream, args);
}

}  // namespace

cudaError_t RandomFill(const RandomFillArgs& args, cudaStream_t stream) {
  if (args.values == nullptr || args.target == nullptr || args.num_rows < 0 || args.num_cols < 0 ||
      args.block_rows <= 0) {
    return cudaErrorInvalidValue;
  }
  switch (args.element_bytes) {
    case 1:
      return Fill<uint8_t>(args, stream);
    case 2:
      return Fill<uint16_t>(args, stream);
    case 4:
      return Fill<uint32_t>(args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace latentd
