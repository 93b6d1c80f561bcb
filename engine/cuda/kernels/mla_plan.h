#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_PLAN_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_PLAN_H_

#include <cstdint>

// What the words of MlaDecodePlanner's plan mean; planner and kernel agree on it here.
//
//   MlaPlanHeader | MlaPlanItem [num_items]
//
// Rows are the (query, head) pairs of a step in the order of q. A sequence's rows are cut into
// units of 64 or 128: what a worker, one or two thread blocks of 64 rows each, attends with at a
// time. Worker w does item w, then its `next`, and so on: a worker's first item is found without
// reading anything else.
namespace latentd {

inline constexpr int kMlaTileRows = 64;
inline constexpr int kMlaBlockKeys = 64;
inline constexpr int kMlaValueDim = 512;

// Thread blocks of a worker. Two share what they read of the cache; with fewer heads the second
// would idle at one query a sequence.
constexpr int MlaTilesPerUnit(int num_heads) { return num_heads % (2 * kMlaTileRows) == 0 ? 2 : 1; }

// Parts of a unit, and workers, at most.
inline constexpr int kMlaMaxParts = 256;

struct alignas(16) MlaPlanHeader {
  int32_t num_workers;
  int32_t num_items;  // >= num_workers
  int32_t num_slots;  // that the workspace has
  int32_t unused;
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
  int32_t num_keys = 0;    // that the unit's last row sees; the last block may hold fewer than 64
  int32_t num_parts = 1;   // that the unit's blocks are cut into
  int32_t part = 0;        // which of them this is, in the order of the blocks
  int32_t first_slot = 0;  // of the workspace, for part 0, when there are several
  int32_t next = -1;       // the worker's next item, -1: none
};

inline constexpr int kMlaHeaderWords = sizeof(MlaPlanHeader) / sizeof(int32_t);
inline constexpr int kMlaItemWords = sizeof(MlaPlanItem) / sizeof(int32_t);

// Workspace of a part, for each 64 rows of its unit: output [64, 512] f32, base 2 logarithms of the
// weights' sums [2, 64] f32, counters [2] u32.
inline constexpr int kMlaPartBytes = (kMlaTileRows * kMlaValueDim + 2 * kMlaTileRows + 2) * 4;

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_PLAN_H_
