#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_PLAN_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_PLAN_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "engine/cuda/kernels/mla_cache.h"

// What the words of MlaDecodePlanner's plan mean; planner and kernels agree on it here.
//
//   MlaPlanHeader | MlaPlanItem [num_items] | MlaPlanMerge [num_merges]
//
// Rows are the (query, head) pairs of a step in the order of q. A sequence's rows are cut into
// units of 64 or 128: what a worker, one or two thread blocks of 64 rows each, attends with at a
// time. Worker w does item w, then its `next`, and so on: a worker's first item is found without
// reading anything else. A unit that several items have parts of is merged by those who had them,
// or, when they are many, by a kernel of its own: a plan has one kind or the other.
namespace latentd {

inline constexpr int kMlaTileRows = 64;

// Thread blocks of a worker. Two share what they read of the cache; with fewer heads the second
// would idle at one query a sequence.
constexpr int MlaTilesPerUnit(int num_heads) { return num_heads % (2 * kMlaTileRows) == 0 ? 2 : 1; }

// Workers, and so parts of a unit, at most.
inline constexpr int kMlaMaxParts = 256;

struct alignas(16) MlaPlanHeader {
  int32_t num_workers;
  int32_t num_items;   // >= num_workers
  int32_t num_slots;   // that the workspace has
  int32_t num_merges;  // for MlaMergeKernel
};

// A unit in parts: slots first_slot, first_slot + 1... of the workspace, in the order of its keys.
struct alignas(16) MlaPlanMerge {
  int32_t row = 0;       // first of the unit, of the step's rows
  int32_t num_rows = 0;  // >= 1
  int32_t first_slot = 0;
  int32_t num_parts = 0;  // 2 to kMlaMaxParts
};

// A unit's rows and a range of its sequence's blocks; a worker without work has an item without
// blocks.
struct alignas(16) MlaPlanItem {
  int32_t sequence = 0;
  int32_t row = 0;           // first of the unit, of the step's rows
  int32_t sequence_row = 0;  // the same, of the sequence's rows
  int32_t num_rows = 0;
  int32_t block_begin = 0;  // of the sequence's block table
  int32_t block_end = 0;
  int32_t first_limit =
      0;  // keys that the sequence's first query sees; each one after it sees one more
  int32_t num_keys = 0;  // that the unit's last row sees; the last block may hold fewer than 64
  int32_t slot = -1;     // of the workspace, for a part; -1: the item has all of its unit's blocks
  int32_t part = 0;  // which of the unit's, in the order of its blocks; their slots follow another
  int32_t num_parts = 0;  // when they are merged by those who had them, else 0
  int32_t next = -1;      // the worker's next item, -1: none
};

inline constexpr int kMlaHeaderWords = sizeof(MlaPlanHeader) / sizeof(int32_t);
inline constexpr int kMlaMergeWords = sizeof(MlaPlanMerge) / sizeof(int32_t);
inline constexpr int kMlaItemWords = sizeof(MlaPlanItem) / sizeof(int32_t);

struct MlaPlanView {
  const MlaPlanHeader* header;
  const MlaPlanItem* items;

  __host__ __device__ explicit MlaPlanView(const int32_t* words)
      : header(reinterpret_cast<const MlaPlanHeader*>(words)),
        items(reinterpret_cast<const MlaPlanItem*>(words + kMlaHeaderWords)) {}
  __host__ __device__ const MlaPlanMerge* merges() const {
    return reinterpret_cast<const MlaPlanMerge*>(items + header->num_items);
  }
};

// Workspace of a part, for each 64 rows of its unit: output [64, 512] f32 of weights whose sum is
// 1, base 2 logarithms of the weights' sums [2, 64] f32, counters [2] u32.
inline constexpr int kMlaPartBytes = (kMlaTileRows * kMlaLatentDim + 2 * kMlaTileRows + 2) * 4;

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_PLAN_H_
