#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_SHARED_CUH_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_SHARED_CUH_

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "engine/cuda/kernels/mla_cache.h"
#include "engine/cuda/kernels/mla_plan.h"
#include "engine/cuda/kernels/ptx.cuh"

// What the warpgroups of MlaDecode's thread blocks have in common: mla_decode.cu tells the whole.
namespace latentd::mla_decode {

constexpr int kRows = kMlaTileRows;
constexpr int kKeys = kMlaBlockKeys;
constexpr int kKeyDim = kMlaKeyDim;
constexpr int kValueDim = kMlaLatentDim;
constexpr int kTiles = kKeyDim / 64;
constexpr int kValueTiles = kValueDim / 64;
constexpr int kTileBytes = 64 * 128;
constexpr int kRegisterTiles = 1;  // of the queries, the last ones
constexpr int kWarpgroup = 128;

enum Role { kProducer, kScores, kLeftValues, kRightValues, kNumRoles };
constexpr int kThreads = kNumRoles * kWarpgroup;

constexpr int kScoresBarrier = 1;  // named barriers of the scores' and the values' warpgroups
constexpr int kValuesBarrier = 2;

// A block's values are handed out in quarters of 128 columns, its rotated dims apart, each with a
// ring of its own kind of slots. The left half of the columns has the quarters 0 and 2 of a block,
// the right half 1 and 3, in the order in which they come and are free again.
constexpr int kQuarterTiles = kValueTiles / 4;
constexpr int kQuarters = 4;
constexpr int kQuarterSlots = 8;
constexpr int kRopeSlots = 2;

// First tile of a quarter.
__host__ __device__ constexpr int QuarterTile(int quarter) {
  return quarter % 2 * 4 + quarter / 2 * 2;
}

struct Shared {
  alignas(1024) uint8_t q[kTiles - kRegisterTiles][kTileBytes];
  alignas(1024) uint8_t quarter[kQuarterSlots][kQuarterTiles][kTileBytes];
  alignas(1024) uint8_t rope[kRopeSlots][kTileBytes];
  alignas(1024) uint8_t p[2][kTileBytes];
  float key_scale[kRopeSlots][kKeys];  // of an FP8 cache; comes and goes with the rope slot
  float scale[2][kRows];               // of O before this P is added
  float weight[kRows];                 // of a finished item's rows: 1 / sum
  float lse[kRows];                    // log2 of the sum of 2^score
  uint64_t quarter_full[kQuarterSlots];
  uint64_t quarter_empty[kQuarterSlots];
  uint64_t rope_full[kRopeSlots];
  uint64_t rope_empty[kRopeSlots];
  uint64_t p_full[2];
  uint64_t p_empty[2];
  uint64_t end_full;  // weight, lse
  uint64_t end_empty;
};
static_assert(sizeof(Shared) <= 227 * 1024);

// Position in a ring of slots, and the parity of its barriers there.
template <int kSize>
struct Ring {
  uint32_t index = 0, parity = 0;
  __device__ __forceinline__ void Advance(uint32_t by = 1) {
    index += by;
    if (index >= kSize) {
      index -= kSize;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ Ring Ahead(uint32_t by) const {
    Ring ring = *this;
    ring.Advance(by);
    return ring;
  }
};

struct Params {
  const std::byte* cache;
  const __nv_bfloat16* q;
  const int32_t* blocks;
  const int32_t* block_begin;
  const int32_t* plan;
  void* workspace;
  int num_heads;
  float scale_log2;
  __nv_bfloat16* out;
};

// What of an item is this thread block's.
struct Work {
  int row, sequence_row, num_rows, block_begin, block_end, first_limit, num_keys, sequence;
  bool is_part;
  int slot;  // of a part; the unit's others are slot_stride apart
  int first_slot, slot_stride;
  int num_parts, part;  // num_parts > 0: to be merged here

  __device__ __forceinline__ Work(const MlaPlanItem& item, int num_heads) {
    const int tiles_per_unit = MlaTilesPerUnit(num_heads);
    const int rank = blockIdx.x % tiles_per_unit;
    sequence = item.sequence;
    row = item.row + rank * kRows;
    sequence_row = item.sequence_row + rank * kRows;
    num_rows = min(max(item.num_rows - rank * kRows, 0), kRows);
    block_begin = item.block_begin;
    block_end = item.block_end;
    first_limit = item.first_limit;
    num_keys = item.num_keys;
    is_part = item.slot >= 0;
    slot = item.slot * tiles_per_unit + rank;
    num_parts = item.num_parts;
    part = item.part;
    slot_stride = tiles_per_unit;
    first_slot = slot - part * slot_stride;
  }
};

template <typename Body>
__device__ __forceinline__ void ForEachWork(const Params& params, const Body& body) {
  const MlaPlanView plan(params.plan);
  const int tiles = MlaTilesPerUnit(params.num_heads);
  const int num_workers = plan.header->num_workers;
  for (int w = blockIdx.x / tiles; w < num_workers; w += gridDim.x / tiles) {
    for (int i = w; i >= 0; i = plan.items[i].next) {
      const MlaPlanItem& item = plan.items[i];
      if (item.block_begin < item.block_end) body(item);
    }
  }
}

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

}  // namespace latentd::mla_decode

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_DECODE_SHARED_CUH_
