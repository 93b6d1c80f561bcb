#include "engine/cuda/group_experts.h"

#include <algorithm>

#include "engine/cuda/cuda_status.h"

namespace latentd {

GroupExperts::GroupExperts(const ModelConfig& config, const StepBuffers& buffers,
                           const Group& group, int rows, cudaStream_t stream)
    : config_(config),
      buffers_(buffers),
      group_(group),
      rows_(rows),
      stream_(stream),
      experts_(group.placement.Experts(config.n_routed_experts)),
      max_rows_(static_cast<int>(MaxExpertRows(config, group.placement.world_size, rows))),
      slot_bytes_(static_cast<int64_t>(SlotBytes(config, rows))) {
  Carver first(buffers.slots), own(buffers.slots + group.placement.rank * slot_bytes_);
  first_ = CarveSlot(config, rows, first);
  own_ = CarveSlot(config, rows, own);
}

RankSlots GroupExperts::slots() const {
  return {.num_ranks = group_.placement.world_size,
          .rows = rows_,
          .slot_bytes = slot_bytes_,
          .topk_ids = first_.topk_ids,
          .weights = first_.weights};
}

// The rows are RouteRows()' to say; until then their memory is scratch.
MoeRouting GroupExperts::own_choices() const {
  MoeRouting routing = buffers_.routing;
  routing.num_choices = config_.num_experts_per_tok;
  routing.topk_ids = own_.topk_ids;
  routing.weights = own_.weights;
  return routing;
}

int GroupExperts::rows_per_expert() const {
  const int64_t choices =
      int64_t{group_.placement.world_size} * rows_ * config_.num_experts_per_tok;
  return static_cast<int>(std::max<int64_t>(1, choices / config_.n_routed_experts));
}

absl::Status GroupExperts::Dispatch() const {
  return group_.exchange->Dispatch(buffers_.slots, static_cast<size_t>(slot_bytes_), stream_);
}

absl::Status GroupExperts::RouteRows(const int32_t* num_real_tokens) const {
  RouteSlotsArgs args;
  args.slots = slots();
  args.own_rank = group_.placement.rank;
  args.num_real_tokens = num_real_tokens;
  args.num_experts_per_tok = config_.num_experts_per_tok;
  args.first_expert = experts_.first;
  args.num_local_experts = experts_.count;
  args.num_shared = config_.n_shared_experts;
  args.max_rows = max_rows_;
  args.routing = buffers_.routing;
  return CudaStatus(RouteSlots(args, stream_), "RouteSlots");
}

GatherArgs GroupExperts::Gather() const {
  GatherArgs args;
  args.routing = buffers_.routing;
  args.num_groups = experts_.count + config_.n_shared_experts;
  args.max_rows = max_rows_;
  args.hidden_size = config_.hidden_size;
  args.x = first_.x;
  args.out = buffers_.gathered;
  args.num_ranks = group_.placement.world_size;
  args.rank_rows = rows_;
  args.slot_bytes = slot_bytes_;
  return args;
}

absl::Status GroupExperts::SumRows() const {
  SumExpertsArgs args;
  args.slots = slots();
  args.num_experts_per_tok = config_.num_experts_per_tok;
  args.hidden_size = config_.hidden_size;
  args.expert_out = buffers_.expert_out;
  args.routing = buffers_.routing;
  args.out = buffers_.expert_sums;
  return CudaStatus(SumExperts(args, stream_), "SumExperts");
}

absl::Status GroupExperts::Combine(__nv_bfloat16* out) const {
  return group_.exchange->Combine(buffers_.expert_sums, int64_t{rows_} * config_.hidden_size, out,
                                  stream_);
}

}  // namespace latentd
