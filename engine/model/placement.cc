#include "engine/model/placement.h"

#include <algorithm>

namespace latentd {

ExpertRange LocalExperts(int32_t n_routed_experts, int32_t rank, int32_t world_size) {
  const int32_t least = n_routed_experts / world_size, more = n_routed_experts % world_size;
  return {.first = rank * least + std::min(rank, more), .count = least + (rank < more ? 1 : 0)};
}

int32_t RankOfExpert(int32_t n_routed_experts, int32_t expert, int32_t world_size) {
  const int32_t least = n_routed_experts / world_size, more = n_routed_experts % world_size;
  const int32_t in_larger = more * (least + 1);  // experts of the ranks that hold one more
  return expert < in_larger ? expert / (least + 1) : more + (expert - in_larger) / least;
}

}  // namespace latentd
