#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_LOAD_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_LOAD_CUH_

#include <cuda.h>

#include "engine/cuda/kernels/mla_decode_shared.cuh"

// The producer: a block's keys into shared memory, as bf16 in tiles of 64 x 64.
namespace latentd::mla_decode {

// One lane brings the tiles of all blocks by TMA. `cache`: rows of 576 bf16.
__device__ __forceinline__ void LoadBlocks(Shared& shared, const Params& params,
                                           const CUtensorMap* cache) {
  Ring<kQuarterSlots> quarter;
  Ring<kRopeSlots> rope;
  ForEachWork(params, [&](const MlaPlanItem& item) {
    const Work work(item, params.num_heads);
    const int32_t* table = params.blocks + params.block_begin[work.sequence];
    int32_t next = table[work.block_begin];
    for (int b = work.block_begin; b < work.block_end; ++b) {
      const int row = next * kKeys;
      if (b + 1 < work.block_end) next = table[b + 1];
#pragma unroll
      for (int q = 0; q < kQuarters; ++q) {
        MbarrierWait(SharedAddress(&shared.quarter_empty[quarter.index]), quarter.parity ^ 1);
        const uint32_t full = SharedAddress(&shared.quarter_full[quarter.index]);
        MbarrierArriveExpect(full, kQuarterTiles * kTileBytes);
#pragma unroll
        for (int t = 0; t < kQuarterTiles; ++t) {
          TmaLoad2d(SharedAddress(shared.quarter[quarter.index][t]), cache, full,
                    (QuarterTile(q) + t) * 64, row);
        }
        quarter.Advance();
        if (q != 1) continue;
        MbarrierWait(SharedAddress(&shared.rope_empty[rope.index]), rope.parity ^ 1);
        const uint32_t rope_full = SharedAddress(&shared.rope_full[rope.index]);
        MbarrierArriveExpect(rope_full, kTileBytes);
        TmaLoad2d(SharedAddress(shared.rope[rope.index]), cache, rope_full, (kTiles - 1) * 64, row);
        rope.Advance();
      }
    }
  });
}

// Two e4m3 in the high bytes of the halves of `x`, low bytes zero, to bf16, exactly.
__device__ __forceinline__ uint32_t WidenPair(uint32_t x) {
  // The exponent moves to the low bits of bf16's: worth 2^-120 of what it was, subnormals too.
  const uint32_t bits = ((x >> 4) & 0x07f007f0u) | (x & 0x80008000u);
  uint32_t wide;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(wide) : "r"(bits), "r"(0x7b807b80u));  // 2^120
  return wide;
}

// A thread's 16 bytes of each of the four rows that it has of a quarter.
struct RawQuarter {
  uint4 bytes[4];
};

// What of a quarter this thread of the warpgroup has: rows Row(i), 16 columns.
struct QuarterThread {
  int row = threadIdx.x % kWarpgroup / 8;
  int part = threadIdx.x % 8;
  __device__ __forceinline__ int Row(int i) const { return row + i * 16; }
};

// `latents`: the block's, from this thread's first byte on.
__device__ __forceinline__ void LoadQuarter(const std::byte* latents, int quarter,
                                            RawQuarter& raw) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(raw.bytes[i].x), "=r"(raw.bytes[i].y), "=r"(raw.bytes[i].z),
                   "=r"(raw.bytes[i].w)
                 : "l"(latents + QuarterTile(quarter) * 64 + i * 16 * kMlaLatentDim));
  }
}

// Swizzled as TMA would; rows from num_keys on become zeros.
__device__ __forceinline__ void StoreQuarter(uint8_t (&slot)[kQuarterTiles][kTileBytes],
                                             const QuarterThread& thread, int num_keys,
                                             const RawQuarter& raw) {
  // Of eight threads, four have a row's left tile: they store the chunks of 8 columns in the other
  // order, so that the eight never meet in a bank.
  const int swap = thread.part / 4;
  const int chunk = thread.part % 4 * 2;
  const int low_bits = thread.row % 8;
  const uint32_t tile = SharedAddress(slot[thread.part / 4]) + thread.row * 128;
  const uint32_t first = tile + ((chunk + swap) ^ low_bits) * 16;
  const uint32_t second = tile + ((chunk + 1 - swap) ^ low_bits) * 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 bytes = raw.bytes[i];
    if (thread.Row(i) >= num_keys) bytes = make_uint4(0, 0, 0, 0);
    const uint2 words[2] = {swap ? make_uint2(bytes.z, bytes.w) : make_uint2(bytes.x, bytes.y),
                            swap ? make_uint2(bytes.x, bytes.y) : make_uint2(bytes.z, bytes.w)};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t to = (k == 0 ? first : second) + i * 16 * 128;
      asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to),
                   "r"(WidenPair(__byte_perm(words[k].x, 0, 0x1404))),
                   "r"(WidenPair(__byte_perm(words[k].x, 0, 0x3424))),
                   "r"(WidenPair(__byte_perm(words[k].y, 0, 0x1404))),
                   "r"(WidenPair(__byte_perm(words[k].y, 0, 0x3424)))
                   : "memory");
    }
  }
}

// The whole warpgroup loads an FP8 cache's latents into registers, two quarters ahead, and widens
// them on the way to shared memory: what is free there is filled again without the memory's
// latency. One lane brings the rotated dims by TMA; `rope`: [num_blocks, 64, 64] bf16.
__device__ __forceinline__ void WidenBlocks(Shared& shared, const Params& params,
                                            const CUtensorMap* rope_map) {
  constexpr int64_t kBlockBytes = MlaCacheBlockBytes(CacheFormat::kFp8);
  constexpr int kAhead = 2;  // blocks that are brought to the L2 cache
  const QuarterThread thread;
  const int index = threadIdx.x % kWarpgroup;
  const int tiles = MlaTilesPerUnit(params.num_heads);
  const uint32_t share = kBlockBytes / tiles;
  const auto latents = [&](int32_t block) {
    const std::byte* from = params.cache + block * kBlockBytes;
    // Or the compiler keeps sums with each of the sixteen offsets that follow in registers.
    asm volatile("" : "+l"(from));
    return from + thread.row * kMlaLatentDim + thread.part * 16;
  };
  Ring<kQuarterSlots> quarter;
  Ring<kRopeSlots> rope;
  ForEachWork(params, [&](const MlaPlanItem& item) {
    const int32_t* table = params.blocks + params.block_begin[item.sequence];
    const int begin = item.block_begin, end = item.block_end, num_keys = item.num_keys;
    int32_t block = table[begin];
    RawQuarter raw[2];
    LoadQuarter(latents(block), 0, raw[0]);
    LoadQuarter(latents(block), 1, raw[1]);
    for (int b = begin; b < end; ++b) {
      const int valid = num_keys - b * kKeys;
      const int32_t next = b + 1 < end ? table[b + 1] : block;
      if (index == kWarpgroup - 1 && b + kAhead < end) {
        asm volatile(
            "cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                params.cache + table[b + kAhead] * kBlockBytes + blockIdx.x % tiles * share),
            "r"(share));
      }
      float key_scale = 0;
      if (index < kKeys && index < valid) {
        key_scale = reinterpret_cast<const float*>(params.cache + block * kBlockBytes +
                                                   kMlaFp8ScaleOffset)[index];
      }
#pragma unroll
      for (int q = 0; q < kQuarters; ++q) {
        MbarrierWait(SharedAddress(&shared.quarter_empty[quarter.index]), quarter.parity ^ 1);
        StoreQuarter(shared.quarter[quarter.index], thread, valid, raw[q % 2]);
        FenceProxyAsync();
        __syncwarp();
        if (index % 32 == 0) MbarrierArrive(SharedAddress(&shared.quarter_full[quarter.index]));
        quarter.Advance();
        if (q < 2 || b + 1 < end) {
          LoadQuarter(latents(q < 2 ? block : next), (q + 2) % kQuarters, raw[q % 2]);
        }
        if (q != 1) continue;
        if (index >= kKeys) continue;
        MbarrierWait(SharedAddress(&shared.rope_empty[rope.index]), rope.parity ^ 1);
        const uint32_t rope_full = SharedAddress(&shared.rope_full[rope.index]);
        shared.key_scale[rope.index][index] = key_scale;
        if (index == 0) {
          MbarrierArriveExpect(rope_full, kTileBytes);
          TmaLoad3d(SharedAddress(shared.rope[rope.index]), rope_map, rope_full, 0, 0, block,
                    CachePolicy::kNormal);
        } else {
          MbarrierArrive(rope_full);
        }
      }
      rope.Advance();
      block = next;
    }
  });
}

}  // namespace latentd::mla_decode

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_LOAD_CUH_
