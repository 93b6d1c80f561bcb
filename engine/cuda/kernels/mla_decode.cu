#include <cuda.h>

#include <algorithm>

#include "engine/cuda/kernels/launch.cuh"
#include "engine/cuda/kernels/mla_decode.h"
#include "engine/cuda/kernels/mla_merge.cuh"
#include "engine/cuda/kernels/mla_plan.h"
#include "engine/cuda/kernels/ptx.cuh"
#include "engine/cuda/kernels/wgmma_bf16.cuh"

// A thread block attends with 64 rows at a time to 64 keys at a time, in four warpgroups:
//
// - producer: brings the cache's blocks by TMA, in tiles of 64 x 64;
// - scores: S = Q K^T as the tiles land, softmax, P as bf16 into one of two buffers;
// - values, two of them: each O[64, 256] += P V[64, 256], half of the columns, in registers;
//
// so that the scores of one block, and their softmax, run beside the values of the block before. K
// and V are the same bytes of shared memory. Queries lie in shared memory but for the last
// kRegisterTiles tiles of 64 columns, which the scores' warpgroup holds in registers.
//
// Rows' maxima are raised only when they have grown by more than 2^kMaxSlack: P stays far from
// bf16's and f32's limits, and O is seldom rescaled.
namespace latentd {
namespace {

constexpr int kRows = kMlaTileRows;
constexpr int kKeys = kMlaBlockKeys;
constexpr int kKeyDim = 576;
constexpr int kValueDim = kMlaValueDim;
constexpr int kTiles = kKeyDim / 64;
constexpr int kValueTiles = kValueDim / 64;
constexpr int kTileBytes = 64 * 128;
constexpr int kRegisterTiles = 1;  // of the queries, the last ones
constexpr int kWarpgroup = 128;
constexpr float kMaxSlack = 8.f;

enum Role { kProducer, kScores, kLeftValues, kRightValues, kNumRoles };
constexpr int kThreads = kNumRoles * kWarpgroup;
constexpr int kProducerRegisters = 32;
constexpr int kScoresRegisters = 144;
constexpr int kValuesRegisters = 168;
static_assert(kProducerRegisters + kScoresRegisters + 2 * kValuesRegisters <= 512);

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
  float scale[2][kRows];  // of O before this P is added
  float weight[kRows];    // of a finished item's rows: 1 / sum
  float lse[kRows];       // log2 of the sum of 2^score
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
  const __nv_bfloat16* cache;
  const __nv_bfloat16* q;
  const int32_t* blocks;
  const int32_t* block_begin;
  const int32_t* plan;
  void* workspace;
  int num_heads;
  float scale_log2;
  __nv_bfloat16* out;
};

struct Plan {
  const MlaPlanHeader* header;
  const MlaPlanItem* items;

  __device__ __forceinline__ explicit Plan(const int32_t* words)
      : header(reinterpret_cast<const MlaPlanHeader*>(words)),
        items(reinterpret_cast<const MlaPlanItem*>(words + kMlaHeaderWords)) {}
};

// What of an item is this thread block's.
struct Work {
  int row, sequence_row, num_rows, block_begin, block_end, first_limit, num_keys, sequence;
  int num_parts, part, first_slot;  // slots of 64 rows, those of the parts are
                                    // `slot_stride` apart
  int slot_stride;

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
    num_parts = item.num_parts;
    part = item.part;
    first_slot = item.first_slot * tiles_per_unit + rank;
    slot_stride = tiles_per_unit;
  }
};

template <typename Body>
__device__ __forceinline__ void ForEachWork(const Params& params, const Body& body) {
  const Plan plan(params.plan);
  const int tiles = MlaTilesPerUnit(params.num_heads);
  const int num_workers = plan.header->num_workers;
  for (int w = blockIdx.x / tiles; w < num_workers; w += gridDim.x / tiles) {
    for (int i = w; i >= 0; i = plan.items[i].next) {
      const MlaPlanItem& item = plan.items[i];
      if (item.block_begin < item.block_end) body(item);
    }
  }
}

// One lane brings the tiles of all blocks.
__device__ __forceinline__ void Produce(Shared& shared, const Params& params,
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

__device__ __forceinline__ uint32_t PackBf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
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
      if (lane == 0) MbarrierArrive(SharedAddress(&shared.rope_empty[rope.index]));
      const int first_key = b * kKeys;
      if (first_key + kKeys > work.num_keys)
        ClearValues(shared, quarter, work.num_keys - first_key);
      if (first_key + kKeys > work.first_limit) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          const int key = first_key + i / 4 * 8 + lane % 4 * 2 + i % 2;
          if (key >= limit[i / 2 % 2]) s[i] = -INFINITY;
        }
      }
      const float scale0 = rows[0].Update(s, 0, params.scale_log2);
      const float scale1 = rows[1].Update(s, 1, params.scale_log2);
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

// Half h of the values' columns.
__device__ __forceinline__ void Accumulate(Shared& shared, const Params& params, int h) {
  const int thread = threadIdx.x % kWarpgroup, lane = thread % 32;
  const int row = thread / 32 * 16 + lane / 4;
  bool has_parts = false;
  const auto num_slots = [&] {
    return int64_t{Plan(params.plan).header->num_slots} * MlaTilesPerUnit(params.num_heads);
  };
  Ring<kQuarterSlots> first = Ring<kQuarterSlots>().Ahead(h);
  Ring<2> buffer, end;
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
      if (lane == 0) {
        MbarrierArrive(SharedAddress(&shared.quarter_empty[second.index]));
        MbarrierArrive(SharedAddress(&shared.p_empty[buffer.index]));
      }
      first.Advance(kQuarters);
      buffer.Advance();
    }
    // The item is read again: its fields would not fit into registers beside O.
    const Work work(item, params.num_heads);
    const MlaParts parts(params.workspace, num_slots());
    MbarrierWait(SharedAddress(&shared.end_full), end.index);
    const float weight[2] = {shared.weight[row], shared.weight[row + 8]};
    const bool is_part = work.num_parts > 1;
    const int64_t part_slot = work.first_slot + work.part * work.slot_stride;
    if (is_part && thread < kRows) {
      parts.lse[(part_slot * 2 + h) * kRows + thread] = shared.lse[thread];
    }
    has_parts |= is_part;
    __syncwarp();
    if (lane == 0) MbarrierArrive(SharedAddress(&shared.end_empty));
    end.Advance();
    const int column = h * (kValueDim / 2) + lane % 4 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int r = row + half * 8;
      if (r >= work.num_rows) continue;
      if (is_part) {
        float* to = parts.out + (part_slot * kRows + r) * kValueDim + column;
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
    if (is_part) FinishPart(parts, work.first_slot, h, kValuesBarrier + h);
  });
  if (!has_parts) return;
  const MlaParts parts(params.workspace, num_slots());
  ForEachWork(params, [&](const MlaPlanItem& item) {
    const Work work(item, params.num_heads);
    if (work.num_parts > 1) {
      MergeParts(parts, work.first_slot, work.slot_stride, work.num_parts, work.part, work.num_rows,
                 h, kValuesBarrier + h, params.out + int64_t{work.row} * kValueDim);
    }
  });
}

__global__ void __launch_bounds__(kThreads, 1)
    MlaDecodeKernel(const __grid_constant__ CUtensorMap cache, const Params params) {
  extern __shared__ __align__(1024) uint8_t storage[];
  Shared& shared = *reinterpret_cast<Shared*>(storage);
  if (threadIdx.x == 0) {
    TmaPrefetchMap(&cache);
    constexpr int kReaders = 4;  // warps
    for (int s = 0; s < kQuarterSlots; ++s) {
      MbarrierInit(SharedAddress(&shared.quarter_full[s]), 1);
      MbarrierInit(SharedAddress(&shared.quarter_empty[s]), kReaders);
    }
    for (int s = 0; s < kRopeSlots; ++s) {
      MbarrierInit(SharedAddress(&shared.rope_full[s]), 1);
      MbarrierInit(SharedAddress(&shared.rope_empty[s]), kReaders);
    }
    for (int i = 0; i < 2; ++i) {
      MbarrierInit(SharedAddress(&shared.p_full[i]), kWarpgroup);
      MbarrierInit(SharedAddress(&shared.p_empty[i]), 8);
    }
    MbarrierInit(SharedAddress(&shared.end_full), kWarpgroup);
    MbarrierInit(SharedAddress(&shared.end_empty), 8);
    FenceMbarrierInit();
  }
  __syncthreads();
  WaitForPrevious();
  LetNextBegin();
  const int role = threadIdx.x / kWarpgroup;
  if (role == kProducer) {
    RegistersDown<kProducerRegisters>();
    if (threadIdx.x == 0) Produce(shared, params, &cache);
  } else if (role == kScores) {
    RegistersUp<kScoresRegisters>();
    Score(shared, params);
  } else {
    RegistersUp<kValuesRegisters>();
    Accumulate(shared, params, role - kLeftValues);
  }
}

// The cache as rows of 576, as many as coordinates reach: what the block tables name is what
// exists.
cudaError_t EncodeCache(const __nv_bfloat16* cache, CUtensorMap* map) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                         cudaEnableDefault, &found) != cudaSuccess ||
        found != cudaDriverEntryPointSuccess) {
      function = nullptr;
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (encode == nullptr) return cudaErrorNotSupported;
  const cuuint64_t dims[2] = {kKeyDim, uint64_t{1} << 31};
  const cuuint64_t strides[1] = {kKeyDim * sizeof(__nv_bfloat16)};
  const cuuint32_t box[2] = {64, kKeys};
  const cuuint32_t steps[2] = {1, 1};
  const CUresult result =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<__nv_bfloat16*>(cache), dims,
             strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t LaunchDecode(const CUtensorMap& map, const Params& params, int num_sms,
                         cudaStream_t stream) {
  static const cudaError_t allowed = cudaFuncSetAttribute(
      MlaDecodeKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (allowed != cudaSuccess) return allowed;
  LaunchShape shape;
  const int tiles = MlaTilesPerUnit(params.num_heads);
  shape.grid = dim3(std::max(num_sms / tiles, 1) * tiles);
  shape.block = dim3(kThreads);
  shape.shared_bytes = sizeof(Shared);
  return Launch(MlaDecodeKernel, shape, stream, map, params);
}

}  // namespace

cudaError_t MlaDecode(const MlaDecodeArgs& args, cudaStream_t stream) {
  if (args.q == nullptr || args.cache == nullptr || args.blocks == nullptr ||
      args.block_begin == nullptr || args.plan == nullptr || args.workspace == nullptr ||
      args.out == nullptr || args.num_heads <= 0 || !(args.softmax_scale > 0)) {
    return cudaErrorInvalidValue;
  }
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  }
  CUtensorMap map;
  if (error == cudaSuccess) error = EncodeCache(args.cache, &map);
  if (error != cudaSuccess) return error;
  constexpr float kLog2E = 1.44269504088896341f;
  const Params params = {args.cache, args.q,         args.blocks,    args.block_begin,
                         args.plan,  args.workspace, args.num_heads, args.softmax_scale * kLog2E,
                         args.out};
  return LaunchDecode(map, params, num_sms, stream);
}

}  // namespace latentd
