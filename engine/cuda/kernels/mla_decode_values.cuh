#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_VALUES_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_VALUES_CUH_

#include "engine/cuda/kernels/mla_decode_shared.cuh"
#include "engine/cuda/kernels/mla_merge.cuh"
#include "engine/cuda/kernels/wgmma_bf16.cuh"

// The values' warpgroups: each O[64, 256] += P V[64, 256], half of the columns, in registers.
namespace latentd::mla_decode {

// Half h of the values' columns.
__device__ __forceinline__ void Accumulate(Shared& shared, const Params& params, int h) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  Ring<kQuarterSlots> first = Ring<kQuarterSlots>().Ahead(h);
  Ring<2> buffer, end;
  bool merges = false;
  ForEachWork(params, [&](const MlaPlanItem& item) {
    const int block_begin = item.block_begin, block_end = item.block_end;
    float o[2][64];
    for (int b = block_begin; b < block_end; ++b) {
      MbarrierWait(SharedAddress(&shared.p_full[buffer.index]), buffer.parity);
      const Ring<kQuarterSlots> second = first.Ahead(2);
      MbarrierWait(SharedAddress(&shared.quarter_full[first.index]), first.parity);
      MbarrierWait(SharedAddress(&shared.quarter_full[second.index]), second.parity);
      if (b > block_begin) {
        const float scale0 = shared.scale[buffer.index][row];
        const float scale1 = shared.scale[buffer.index][row + 8];
        if (__any_sync(0xffffffff, scale0 != 1 || scale1 != 1)) {
#pragma unroll
          for (int i = 0; i < 128; ++i) o[i / 64][i % 64] *= i / 2 % 2 == 0 ? scale0 : scale1;
        }
      }
      const uint64_t p = WgmmaDescriptor(SharedAddress(shared.p[buffer.index]));
      WgmmaPin(o[0]);
      WgmmaPin(o[1]);
      WgmmaFence();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint64_t v = WgmmaDescriptorTransposed(
            SharedAddress(shared.quarter[i == 0 ? first.index : second.index]), kTileBytes);
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          WgmmaBf16Transposed(o[i], p + step * 2, v + step * (16 * 128 / 16),
                              b > block_begin || step > 0);
        }
        WgmmaCommit();
      }
      WgmmaWait<1>();
      if (lane == 0) MbarrierArrive(SharedAddress(&shared.quarter_empty[first.index]));
      WgmmaWait<0>();
      WgmmaPin(o[0]);
      WgmmaPin(o[1]);
      if (lane == 0) MbarrierArrive(SharedAddress(&shared.quarter_empty[second.index]));
      MbarrierArrive(SharedAddress(&shared.p_empty[buffer.index]));
      first.Advance(kQuarters);
      buffer.Advance();
    }
    // The item is read again: its fields would not fit into registers beside O.
    const Work work(item, params.num_heads);
    const MlaParts parts(params.workspace, params.plan, params.num_heads);
    MbarrierWait(SharedAddress(&shared.end_full), end.index);
    const float weight[2] = {shared.weight[row], shared.weight[row + 8]};
    if (work.is_part && thread < kRows) {
      parts.lse[(int64_t{work.slot} * 2 + h) * kRows + thread] = shared.lse[thread];
    }
    merges |= work.num_parts > 0;
    __syncwarp();
    if (lane == 0) MbarrierArrive(SharedAddress(&shared.end_empty));
    end.Advance();
    const int column = h * (kValueDim / 2) + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8;
      if (r >= work.num_rows) continue;
      if (work.is_part) {
        float* to = parts.out + (int64_t{work.slot} * kRows + r) * kValueDim + column;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          *reinterpret_cast<float2*>(to + j * 8) =
              make_float2(o[j / 16][j % 16 * 4 + 2 * half] * weight[half],
                          o[j / 16][j % 16 * 4 + 2 * half + 1] * weight[half]);
        }
      } else {
        __nv_bfloat16* to = params.out + (int64_t{work.row} + r) * kValueDim + column;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          *reinterpret_cast<uint32_t*>(to + j * 8) =
              PackBf16(o[j / 16][j % 16 * 4 + 2 * half] * weight[half],
                       o[j / 16][j % 16 * 4 + 2 * half + 1] * weight[half]);
        }
      }
    }
    if (work.num_parts > 0) FinishPart(parts, work.first_slot, h, kValuesBarrier + h);
  });
  if (!merges) return;
  const MlaParts parts(params.workspace, params.plan, params.num_heads);
  ForEachWork(params, [&](const MlaPlanItem& item) {
    const Work work(item, params.num_heads);
    if (work.num_parts > 0) {
      MergeParts(parts, work.first_slot, work.slot_stride, work.num_parts, work.part, work.num_rows,
                 h, kValuesBarrier + h, params.out + int64_t{work.row} * kValueDim);
    }
  });
}

}  // namespace latentd::mla_decode

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_VALUES_CUH_
