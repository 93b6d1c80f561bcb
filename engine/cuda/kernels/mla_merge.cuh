#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_MERGE_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_MERGE_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mla_plan.h"
#include "engine/cuda/kernels/ptx.cuh"

// How the parts of the same 64 rows are put together, in the order of the keys.
//
// A few: by the thread blocks that have them. Each writes its part, waits until all are there, and
// adds up the rows that are its share. The waiting is safe because a grid never has more thread
// blocks than multiprocessors and a block waits only when all of its own parts are written.
//
// Many: by MlaMergeKernel, after all.
namespace latentd {

// Parts of 64 rows by 256 columns of values, half h of them: f32 out [64, 512] (its half), lse [2,
// 64] (its own copy).
struct MlaParts {
  float* out;        // [num_slots, 64, 512], normalised
  float* lse;        // [num_slots, 2, 64], base 2
  uint32_t* counts;  // [num_slots, 2]: of parts that are there, then of merges that are done; 0
                     // before and after

  __device__ __forceinline__ MlaParts(void* workspace, const int32_t* plan, int num_heads) {
    const int64_t num_slots =
        int64_t{MlaPlanView(plan).header->num_slots} * MlaTilesPerUnit(num_heads);
    out = static_cast<float*>(workspace);
    lse = out + num_slots * kMlaTileRows * kMlaLatentDim;
    counts = reinterpret_cast<uint32_t*>(lse + num_slots * 2 * kMlaTileRows);
  }
};

__device__ __forceinline__ uint32_t LoadAcquire(const uint32_t* from) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
__device__ __forceinline__ uint32_t AddAcquireRelease(uint32_t* to, uint32_t add) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(old)
               : "l"(to), "r"(add)
               : "memory");
  return old;
}

// A piece is 128 columns of a row, 4 floats a lane. A warp takes kPieces at a time and loads kParts
// parts of each before it adds them up: what hides the latency.
template <int kPieces, int kParts>
__device__ __forceinline__ void MergePieces(const MlaParts& parts, int first_slot, int slot_stride,
                                            int num_parts, int part, int num_rows, int h,
                                            __nv_bfloat16* out) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int share =
      (num_rows - part + num_parts - 1) / num_parts;  // rows part, part + num_parts...
  for (int piece = warp * kPieces; piece < share * 2; piece += 4 * kPieces) {
    int row[kPieces];
    float top[kPieces];
    float4 sum[kPieces];
    float total[kPieces];
    const float4* from[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      row[i] = part + min(piece + i, share * 2 - 1) / 2 * num_parts;
      const int column = h * (kMlaLatentDim / 2) + (piece + i) % 2 * 128 + lane * 4;
      from[i] = reinterpret_cast<const float4*>(
          parts.out + (int64_t{first_slot} * kMlaTileRows + row[i]) * kMlaLatentDim + column);
      top[i] = -INFINITY;
      total[i] = 0;
      sum[i] = make_float4(0, 0, 0, 0);
    }
    const auto lse = [&](int p, int i) {
      return __ldcg(parts.lse +
                    ((int64_t{first_slot} + int64_t{p} * slot_stride) * 2 + h) * kMlaTileRows +
                    row[i]);
    };
    for (int p = lane; p < num_parts; p += 32) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) top[i] = fmaxf(top[i], lse(p, i));
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        top[i] = fmaxf(top[i], __shfl_xor_sync(0xffffffff, top[i], step));
      }
      if (top[i] == -INFINITY) top[i] = 0;  // no part saw a key: all weights are zeros
    }
    for (int begin = 0; begin < num_parts; begin += kParts) {
      float4 loaded[kPieces][kParts];
      float weight[kPieces][kParts];
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        const int p = min(begin + k, num_parts - 1);
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          loaded[i][k] =
              __ldcg(from[i] + int64_t{p} * slot_stride * (kMlaTileRows * kMlaLatentDim / 4));
          weight[i][k] = lse(p, i);
        }
      }
#pragma unroll
      for (int k = 0; k < kParts; ++k) {
        if (begin + k >= num_parts) break;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const float w = exp2f(weight[i][k] - top[i]);
          total[i] += w;
          sum[i].x += w * loaded[i][k].x;
          sum[i].y += w * loaded[i][k].y;
          sum[i].z += w * loaded[i][k].z;
          sum[i].w += w * loaded[i][k].w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (piece + i >= share * 2) break;
      const float inverse = total[i] == 0 ? 0 : 1 / total[i];
      const int column = h * (kMlaLatentDim / 2) + (piece + i) % 2 * 128 + lane * 4;
      const __nv_bfloat162 low = __floats2bfloat162_rn(sum[i].x * inverse, sum[i].y * inverse);
      const __nv_bfloat162 high = __floats2bfloat162_rn(sum[i].z * inverse, sum[i].w * inverse);
      uint2 packed;
      packed.x = *reinterpret_cast<const uint32_t*>(&low);
      packed.y = *reinterpret_cast<const uint32_t*>(&high);
      *reinterpret_cast<uint2*>(out + int64_t{row[i]} * kMlaLatentDim + column) = packed;
    }
  }
}

// The warpgroup of half h has written its part; `barrier` is a named barrier of its own.
__device__ __forceinline__ void FinishPart(const MlaParts& parts, int first_slot, int h,
                                           int barrier) {
  NamedBarrier(barrier, 128);
  if (threadIdx.x % 128 == 0) AddAcquireRelease(parts.counts + int64_t{first_slot} * 2 + h, 1);
}

// Merges this thread block's share of rows. Slots of the unit's parts are first_slot + i
// slot_stride.
__device__ __forceinline__ void MergeParts(const MlaParts& parts, int first_slot, int slot_stride,
                                           int num_parts, int part, int num_rows, int h,
                                           int barrier, __nv_bfloat16* out) {
  uint32_t* count = parts.counts + int64_t{first_slot} * 2 + h;
  if (threadIdx.x % 128 == 0) {
    while (LoadAcquire(count) < static_cast<uint32_t>(num_parts)) {
    }
  }
  NamedBarrier(barrier, 128);
  if (part < num_rows) {
    if (num_parts <= 3) {
      MergePieces<4, 2>(parts, first_slot, slot_stride, num_parts, part, num_rows, h, out);
    } else if (num_parts <= 12) {
      MergePieces<4, 4>(parts, first_slot, slot_stride, num_parts, part, num_rows, h, out);
    } else {
      MergePieces<1, 16>(parts, first_slot, slot_stride, num_parts, part, num_rows, h, out);
    }
  }
  NamedBarrier(barrier, 128);
  // The last to be done leaves the count as it was found.
  if (threadIdx.x % 128 == 0 &&
      AddAcquireRelease(count, 1) == 2 * static_cast<uint32_t>(num_parts) - 1) {
    *count = 0;
  }
}

inline constexpr int kMergeWarps = 8;   // of a thread block of MlaMergeKernel
inline constexpr int kMergePieces = 4;  // of a row: 128 columns, a float4 of every lane of a warp

// The sum of a piece's parts times 2^(lse - top), over the sum of those weights. kParts of them are
// loaded before they are added up: what hides the latency.
template <int kParts>
__device__ __forceinline__ float4 MergePiece(const float4* from, int64_t part_stride,
                                             const float* lse, int64_t lse_stride, int num_parts) {
  float top = -INFINITY, total = 0;
  float4 sum = make_float4(0, 0, 0, 0);
  for (int begin = 0; begin < num_parts; begin += kParts) {
    float4 loaded[kParts];
    float weight[kParts];
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const int p = min(begin + k, num_parts - 1);
      weight[k] = begin + k < num_parts ? __ldcg(lse + p * lse_stride) : -INFINITY;
      loaded[k] = __ldcg(from + p * part_stride);
    }
    const float before = top;
#pragma unroll
    for (int k = 0; k < kParts; ++k) top = fmaxf(top, weight[k]);
    const float offset = top == -INFINITY ? 0 : top;  // no part saw a key: all weights are zeros
    const float scale = exp2f(before - offset);
    total *= scale;
    sum = make_float4(sum.x * scale, sum.y * scale, sum.z * scale, sum.w * scale);
#pragma unroll
    for (int k = 0; k < kParts; ++k) {
      const float w = exp2f(weight[k] - offset);
      total += w;
      sum.x += w * loaded[k].x;
      sum.y += w * loaded[k].y;
      sum.z += w * loaded[k].z;
      sum.w += w * loaded[k].w;
    }
  }
  const float inverse = total == 0 ? 0 : 1 / total;
  return make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse);
}

// Adds up the parts of the plan's merges, a warp for a piece at a time.
__global__ void __launch_bounds__(kMergeWarps * 32)
    MlaMergeKernel(const int32_t* plan_words, void* workspace, int num_heads, __nv_bfloat16* out) {
  LetNextBegin();
  // The plan is the step's: no kernel writes it.
  const MlaPlanView plan(plan_words);
  const int tiles = MlaTilesPerUnit(num_heads);
  const int unit_pieces = tiles * kMlaTileRows * kMergePieces;
  const int num_pieces = plan.header->num_merges * unit_pieces;
  const MlaParts parts(workspace, plan_words, num_heads);
  const int lane = threadIdx.x % 32;
  const int first = blockIdx.x * kMergeWarps + threadIdx.x / 32;
  MlaPlanMerge merge;
  if (first < num_pieces) merge = plan.merges()[first / unit_pieces];
  WaitForPrevious();
  for (int i = first; i < num_pieces; i += gridDim.x * kMergeWarps) {
    if (i > first) merge = plan.merges()[i / unit_pieces];
    const int row = i % unit_pieces / kMergePieces;
    const int column = i % kMergePieces * 128 + lane * 4;
    if (row >= merge.num_rows) continue;
    const int64_t slot = int64_t{merge.first_slot} * tiles + row / kMlaTileRows;
    const float4* from = reinterpret_cast<const float4*>(
        parts.out + (slot * kMlaTileRows + row % kMlaTileRows) * kMlaLatentDim + column);
    const float* lse = parts.lse + slot * 2 * kMlaTileRows + row % kMlaTileRows;
    const int64_t stride = int64_t{tiles} * kMlaTileRows;
    const float4 sum =
        MergePiece<16>(from, stride * kMlaLatentDim / 4, lse, stride * 2, merge.num_parts);
    const __nv_bfloat162 low = __floats2bfloat162_rn(sum.x, sum.y);
    const __nv_bfloat162 high = __floats2bfloat162_rn(sum.z, sum.w);
    uint2 packed;
    packed.x = *reinterpret_cast<const uint32_t*>(&low);
    packed.y = *reinterpret_cast<const uint32_t*>(&high);
    *reinterpret_cast<uint2*>(out + (int64_t{merge.row} + row) * kMlaLatentDim + column) = packed;
  }
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_MERGE_CUH_
