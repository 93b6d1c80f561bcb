#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_SCORES_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_SCORES_CUH_

#include "engine/cuda/kernels/mla_decode_shared.cuh"
#include "engine/cuda/kernels/wgmma_bf16.cuh"

// The scores' warpgroup: S = Q K^T as the keys land, softmax, P as bf16 into one of two buffers.
namespace latentd::mla_decode {

constexpr float kMaxSlack = 8.f;

// Tiles [0, kTiles - kRegisterTiles) of 64 rows go to shared memory, swizzled as TMA would; rows
// past num_rows are zeros.
__device__ __forceinline__ void LoadQueries(Shared& shared, const Params& params, const Work& work,
                                            uint32_t (&registers)[kRegisterTiles][4][4]) {
  constexpr int kChunks = (kTiles - kRegisterTiles) * 8;  // 16 bytes each, of a row
  const int thread = threadIdx.x % kWarpgroup;
  NamedBarrier(kScoresBarrier, kWarpgroup);  // all have read the last item's
  const __nv_bfloat16* q = params.q + int64_t{work.row} * kKeyDim;
#pragma unroll 8
  for (int i = thread; i < kRows * kChunks; i += kWarpgroup) {
    const int row = i / kChunks, chunk = i % kChunks;
    const uint32_t to =
        SharedAddress(shared.q[chunk / 8]) + row * 128 + ((chunk % 8) ^ (row % 8)) * 16;
    const int bytes = row < work.num_rows ? 16 : 0;
    const __nv_bfloat16* from = q + (bytes == 0 ? 0 : row * kKeyDim + chunk * 8);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes)
                 : "memory");
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  const int row = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int t = 0; t < kRegisterTiles; ++t) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int r = row + i % 2 * 8;
        const int column = (kTiles - kRegisterTiles + t) * 64 + k * 16 + i / 2 * 8 + thread % 4 * 2;
        registers[t][k][i] =
            r < work.num_rows ? *reinterpret_cast<const uint32_t*>(q + r * kKeyDim + column) : 0;
      }
    }
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
  FenceProxyAsync();
  NamedBarrier(kScoresBarrier, kWarpgroup);
}

__device__ __forceinline__ void ComputeScores(Shared& shared, const Ring<kQuarterSlots>& first,
                                              const Ring<kRopeSlots>& rope,
                                              const uint32_t (&registers)[kRegisterTiles][4][4],
                                              float (&s)[32]) {
  const auto add = [&](const void* slot, int tile, bool accumulate) {
    const uint64_t k = WgmmaDescriptor(SharedAddress(slot));
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      if (tile < kTiles - kRegisterTiles) {
        const uint64_t q = WgmmaDescriptor(SharedAddress(shared.q[tile]));
        WgmmaBf16(s, q + step * 2, k + step * 2, accumulate || step > 0);
      } else {
        WgmmaBf16(s, registers[tile - (kTiles - kRegisterTiles)][step], k + step * 2,
                  accumulate || step > 0);
      }
    }
  };
  WgmmaPin(s);
  WgmmaFence();
#pragma unroll
  for (int q = 0; q < kQuarters; ++q) {
    const Ring<kQuarterSlots> slot = first.Ahead(q);
    MbarrierWait(SharedAddress(&shared.quarter_full[slot.index]), slot.parity);
#pragma unroll
    for (int t = 0; t < kQuarterTiles; ++t)
      add(shared.quarter[slot.index][t], QuarterTile(q) + t, q + t > 0);
    if (q != 1) continue;
    MbarrierWait(SharedAddress(&shared.rope_full[rope.index]), rope.parity);
    add(shared.rope[rope.index], kTiles - 1, true);
  }
  WgmmaCommit();
  WgmmaWait<0>();
  WgmmaPin(s);
}

// The values of keys that nobody sees may be anything, NaN too, and 0 * NaN is NaN: they become
// zeros.
__device__ __forceinline__ void ClearValues(Shared& shared, const Ring<kQuarterSlots>& first,
                                            int num_keys) {
  const int chunks = (kKeys - num_keys) * 8;  // of a tile
  for (int i = threadIdx.x % kWarpgroup; i < chunks * kValueTiles; i += kWarpgroup) {
    const int tile = i / chunks;
    const uint32_t slot = first.Ahead(tile / kQuarterTiles).index;
    const uint32_t to = SharedAddress(shared.quarter[slot][tile % kQuarterTiles]) + num_keys * 128 +
                        i % chunks * 16;
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
  }
}

__device__ __forceinline__ float Exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Running softmax of one of the two rows that a thread has 16 scores of.
struct RowState {
  float max = -INFINITY;
  float sum = 0;  // of this thread's columns

  // Scores of row half h, s[4 j + 2 h], s[4 j + 2 h + 1], become weights. Returns the scale of what
  // was summed before.
  __device__ __forceinline__ float Update(float (&s)[32], int h, float scale_log2) {
    float top = -INFINITY;
#pragma unroll
    for (int j = 0; j < 8; ++j) top = fmaxf(top, fmaxf(s[4 * j + 2 * h], s[4 * j + 2 * h + 1]));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 1));
    top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, 2));
    top *= scale_log2;
    float scale = 1;
    if (top > max + kMaxSlack) {
      scale = Exp2(max - top);
      max = top;
    }
    const float offset = max == -INFINITY ? 0 : max;
    float add = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int i = 4 * j + 2 * h; i < 4 * j + 2 * h + 2; ++i) {
        s[i] = Exp2(s[i] * scale_log2 - offset);
        add += s[i];
      }
    }
    sum = sum * scale + add;
    return scale;
  }
  __device__ __forceinline__ float RowSum() const {
    float all = sum + __shfl_xor_sync(0xffffffff, sum, 1);
    return all + __shfl_xor_sync(0xffffffff, all, 2);
  }
};

// An FP8 cache's keys are multiplied without their scales: the scores are scaled instead, and the
// weights, which stand for the values' scales. `scales`: from this thread's first column on.
__device__ __forceinline__ void ScaleKeys(const float* scales, float (&s)[32]) {
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const float2 scale = *reinterpret_cast<const float2*>(scales + 8 * j);
    s[4 * j] *= scale.x;
    s[4 * j + 1] *= scale.y;
    s[4 * j + 2] *= scale.x;
    s[4 * j + 3] *= scale.y;
  }
}

template <bool kFp8>
__device__ __forceinline__ void Score(Shared& shared, const Params& params) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  Ring<kQuarterSlots> quarter;
  Ring<kRopeSlots> rope;
  Ring<2> buffer, end;
  ForEachWork(params, [&](const MlaPlanItem& item) {
    const Work work(item, params.num_heads);
    uint32_t registers[kRegisterTiles][4][4];
    LoadQueries(shared, params, work, registers);
    RowState rows[2];
    int limit[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      limit[h] = work.first_limit + (work.sequence_row + row + 8 * h) / params.num_heads;
    }
    for (int b = work.block_begin; b < work.block_end; ++b) {
      float s[32];
      ComputeScores(shared, quarter, rope, registers, s);
      if (!kFp8 && lane == 0) MbarrierArrive(SharedAddress(&shared.rope_empty[rope.index]));
      const int first_key = b * kKeys;
      const float* key_scale = &shared.key_scale[rope.index][lane % 4 * 2];
      if (kFp8) {
        ScaleKeys(key_scale, s);
      } else if (first_key + kKeys > work.num_keys) {
        ClearValues(shared, quarter, work.num_keys - first_key);
      }
      if (first_key + kKeys > work.first_limit) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (key >= limit[i / 2 % 2]) s[i] = -INFINITY;
        }
      }
      const float scale0 = rows[0].Update(s, 0, params.scale_log2);
      const float scale1 = rows[1].Update(s, 1, params.scale_log2);
      if (kFp8) {
        ScaleKeys(key_scale, s);
        MbarrierArrive(SharedAddress(&shared.rope_empty[rope.index]));
      }
      MbarrierWait(SharedAddress(&shared.p_empty[buffer.index]), buffer.parity ^ 1);
      const uint32_t p = SharedAddress(shared.p[buffer.index]) + row * 128 + lane % 4 * 4;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const uint32_t to = p + ((j ^ (row % 8)) << 4);
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to), "r"(PackBf16(s[4 * j], s[4 * j + 1]))
                     : "memory");
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(to + 1024),
                     "r"(PackBf16(s[4 * j + 2], s[4 * j + 3]))
                     : "memory");
      }
      if (lane % 4 == 0) {
        shared.scale[buffer.index][row] = scale0;
        shared.scale[buffer.index][row + 8] = scale1;
      }
      FenceProxyAsync();
      MbarrierArrive(SharedAddress(&shared.p_full[buffer.index]));
      quarter.Advance(kQuarters);
      rope.Advance();
      buffer.Advance();
    }
    MbarrierWait(SharedAddress(&shared.end_empty), end.index ^ 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float sum = rows[h].RowSum();
      if (lane % 4 == 0) {
        shared.weight[row + 8 * h] = sum == 0 ? 0 : 1 / sum;
        shared.lse[row + 8 * h] = sum == 0 ? -INFINITY : rows[h].max + log2f(sum);
      }
    }
    MbarrierArrive(SharedAddress(&shared.end_full));
    end.Advance();
  });
}

}  // namespace latentd::mla_decode

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_SCORES_CUH_
