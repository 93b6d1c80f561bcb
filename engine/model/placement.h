#ifndef LATENTD_ENGINE_MODEL_PLACEMENT_H_
#define LATENTD_ENGINE_MODEL_PLACEMENT_H_

#include <cstdint>

namespace latentd {

// Which routed experts a rank of an expert-parallel group holds; of everything else it holds all.
struct ExpertRange {
  int32_t first = 0;
  int32_t count = 0;

  bool contains(int32_t expert) const { return expert >= first && expert < first + count; }
};

// Experts in order, as evenly as it goes: the first n_routed_experts % world_size ranks hold one
// more than the others, which may hold none.
//   rank  [0, world_size)
ExpertRange LocalExperts(int32_t n_routed_experts, int32_t rank, int32_t world_size);

// The rank that holds `expert`.
int32_t RankOfExpert(int32_t n_routed_experts, int32_t expert, int32_t world_size);

// A rank's place in its group; the default is a model that is alone.
struct Placement {
  int32_t rank = 0;
  int32_t world_size = 1;

  ExpertRange Experts(int32_t n_routed_experts) const {
    return LocalExperts(n_routed_experts, rank, world_size);
  }
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_PLACEMENT_H_
