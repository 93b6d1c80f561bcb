// Copies each expert row from its token's row. Bound by bytes: hidden_size read and written once a
// row.

#include <algorithm>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/moe.h"

namespace latentd {
namespace {

constexpr int kRows = 8;  // of a block, a warp each: their scales are 32 bytes side by side
constexpr int kThreads = 32 * kRows;
constexpr int kBatch = 8;  // 16-byte loads of a lane under way

__device__ __forceinline__ void CopyRow(const uint4* from, uint4* to, int vectors, int lane) {
  for (int base = lane; base < vectors; base += 32 * kBatch) {
    uint4 values[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i < vectors) values[i] = from[base + 32 * i];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (base + 32 * i < vectors) to[base + 32 * i] = values[i];
    }
  }
}

// Where token `token` of the group lies. Ids of an exchange that was broken off are any bytes: they
// lead to some token of it.
__device__ __forceinline__ void FindInSlots(const GatherArgs& args, int64_t& token,
                                            int64_t& slot_begin) {
  const uint32_t last = args.num_ranks * args.rank_rows - 1;
  const uint32_t of_group = min(static_cast<uint32_t>(token), last);
  slot_begin = of_group / args.rank_rows * args.slot_bytes;
  token = of_group % args.rank_rows;
}

template <typename T>
__device__ __forceinline__ const T* Shifted(const T* pointer, int64_t bytes) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(pointer) + bytes);
}

template <bool kSlots>
__global__ void __launch_bounds__(kThreads) Gather(GatherArgs args) {
  WaitForPrevious();
  LetNextBegin();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_rows = min(args.routing.group_offsets[args.num_groups], args.max_rows);
  const int groups = args.hidden_size / kQuantGroup;
  for (int first = blockIdx.x * kRows; first < num_rows; first += gridDim.x * kRows) {
    if (first + warp < num_rows) {
      const int64_t row = first + warp;
      int64_t token = args.routing.token_of_row[row], slot = 0;
      if constexpr (kSlots) FindInSlots(args, token, slot);
      if (args.out.fp8.data != nullptr) {
        CopyRow(reinterpret_cast<const uint4*>(Shifted(args.x.fp8.data, slot) +
                                               token * args.hidden_size),
                reinterpret_cast<uint4*>(args.out.fp8.data + row * args.hidden_size),
                args.hidden_size / 16, lane);
      }
      if (args.out.bf16 != nullptr) {
        CopyRow(
            reinterpret_cast<const uint4*>(Shifted(args.x.bf16, slot) + token * args.hidden_size),
            reinterpret_cast<uint4*>(args.out.bf16 + row * args.hidden_size), args.hidden_size / 8,
            lane);
      }
    }
    const int row = first + threadIdx.x % kRows;
    if (args.out.fp8.data != nullptr && row < num_rows) {
      int64_t token = args.routing.token_of_row[row], slot = 0;
      if constexpr (kSlots) FindInSlots(args, token, slot);
      const float* scales = Shifted(args.x.fp8.scales, slot);
      for (int g = threadIdx.x / kRows; g < groups; g += kThreads / kRows) {
        args.out.fp8.scales[g * args.out.fp8.scale_stride + row] =
            scales[g * args.x.fp8.scale_stride + token];
      }
    }
  }
}

}  // namespace

cudaError_t GatherRows(const GatherArgs& args, cudaStream_t stream) {
  const bool fp8 = args.out.fp8.data != nullptr, bf16 = args.out.bf16 != nullptr;
  if (args.max_rows < 0 || args.num_groups < 1 || args.hidden_size < 1 || (!fp8 && !bf16) ||
      args.routing.group_offsets == nullptr || args.routing.token_of_row == nullptr) {
    return cudaErrorInvalidValue;
  }
  if (fp8 && (args.hidden_size % kQuantGroup != 0 || args.x.fp8.data == nullptr ||
              args.x.fp8.scales == nullptr || args.out.fp8.scales == nullptr ||
              args.out.fp8.scale_stride < args.max_rows)) {
    return cudaErrorInvalidValue;
  }
  if (bf16 && (args.hidden_size % 8 != 0 || args.x.bf16 == nullptr)) return cudaErrorInvalidValue;
  if (args.num_ranks > 0 &&
      (args.rank_rows < 1 || args.slot_bytes < 0 || args.slot_bytes % 16 != 0))
    return cudaErrorInvalidValue;
  if (args.max_rows == 0) return cudaSuccess;
  constexpr int kMostBlocks = 132 * 8;  // all that a GPU holds at once
  const int blocks = std::min((args.max_rows + kRows - 1) / kRows, kMostBlocks);
  return Launch(args.num_ranks > 0 ? Gather<true> : Gather<false>,
                {.grid = dim3(blocks), .block = dim3(kThreads)}, stream, args);
}

}  // namespace latentd
