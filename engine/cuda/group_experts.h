#ifndef LATENTD_ENGINE_CUDA_GROUP_EXPERTS_H_
#define LATENTD_ENGINE_CUDA_GROUP_EXPERTS_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "engine/cuda/gpu_exchange.h"
#include "engine/cuda/kernels/exchange.h"
#include "engine/cuda/kernels/moe.h"
#include "engine/cuda/step_buffers.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"

namespace latentd {

// A piece of a step whose experts are those of all ranks. In this order: the norm writes own().x,
// the router own()'s choices, Dispatch(), RouteRows(); the rows are gathered and computed;
// SumRows(), Combine(). The shared experts stay on the rank of the token; what they give goes into
// its sum.
class GroupExperts {
 public:
  // A rank of a group.
  struct Group {
    Placement placement;
    GpuExchange* exchange = nullptr;
  };

  // `rows`: tokens of each rank, padding included. All references outlive it.
  GroupExperts(const ModelConfig& config, const StepBuffers& buffers, const Group& group, int rows,
               cudaStream_t stream);

  // What this rank sends.
  const TokenSlot& own() const { return own_; }
  // Where the router is to put its choices: of no expert here, and so without rows.
  MoeRouting own_choices() const;

  // Rows that the experts have at most, and on average as far as the group is balanced.
  int max_rows() const { return max_rows_; }
  int rows_per_expert() const;

  absl::Status Dispatch() const;
  // num_real_tokens: of this rank's own, on the device.
  absl::Status RouteRows(const int32_t* num_real_tokens) const;
  // The rows' inputs, to be gathered.
  GatherArgs Gather() const;
  absl::Status SumRows() const;
  // out [rows, hidden_size]: what all experts give to this rank's tokens.
  absl::Status Combine(__nv_bfloat16* out) const;

 private:
  RankSlots slots() const;

  const ModelConfig& config_;
  const StepBuffers& buffers_;
  const Group& group_;
  const int rows_;
  const cudaStream_t stream_;
  const ExpertRange experts_;
  const int max_rows_;
  const int64_t slot_bytes_;
  TokenSlot own_, first_;  // this rank's and rank 0's
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GROUP_EXPERTS_H_
