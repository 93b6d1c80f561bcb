#ifndef LATENTD_ENGINE_CPU_CPU_ENGINE_H_
#define LATENTD_ENGINE_CPU_CPU_ENGINE_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "engine/cpu/group_transport.h"
#include "engine/group_member.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"

namespace latentd {

struct CpuEngineOptions {
  int32_t num_threads = 0;         // 0: one per core
  int32_t num_blocks = 0;          // KV cache blocks of kBlockSize tokens; >= 1
  int32_t max_step_tokens = 2048;  // >= 1
  int32_t max_sequences = 256;     // >= 1
  int32_t max_model_len = 0;       // 0: max_position_embeddings; never more than that
  // Rounds the inputs of FP8 projections to FP8 as a GPU's FP8 products have them: a scale for each
  // token and block_cols columns. All but kv_b_proj, which the absorbed form multiplies in f32.
  // Nothing changes for weights that are not FP8. For comparisons: slower, and less exact.
  bool quantize_activations = false;
  // Rounds the rows of the latent cache as a GPU holds them in FP8 (CacheFormat::kFp8). For
  // comparisons too.
  bool quantize_cache = false;
  Placement placement = {};  // as one rank of a group: which of its experts are here
};

// The model on the CPU in fp32: the reference of every other engine, and the embedded default.
//
// Absorbed MLA over a paged latent cache [num_hidden_layers, num_blocks, 64, latent_dim] f32. Each
// number is computed in one order that depends on its own sequence alone, so batch, chunk size,
// prefix hits and preemption change nothing, bit for bit; nor does the number of ranks.
//
// As one rank of a group, made with a transport, it does as GroupMember says. What fails for this
// rank alone, without the others' part, costs them nothing:
// - A plan that is refused: the rank runs the step with no tokens of its own, then returns the
//   error. But a plan.shape that cannot be (it is smaller than the plan, or beyond the limits) says
//   nothing of what the others do; it ends the group (AbortGroup), and their step with it.
// - A sequence that cannot be sampled, for logits that are not finite say: all collectives are done
//   by then.
class CpuEngine : public GroupMember {
 public:
  // An engine that is alone, or with a `transport` the rank options.placement.rank of a group. Of
  // `weights` the routed experts of the placement are read.
  //
  // INVALID_ARGUMENT names a wrong option; RESOURCE_EXHAUSTED, with the numbers, when weights and
  // cache do not fit into memory.
  static absl::StatusOr<std::unique_ptr<CpuEngine>> Create(
      const ModelConfig& config, const ModelWeights& weights, const CpuEngineOptions& options,
      std::unique_ptr<GroupTransport> transport = nullptr);
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_CPU_ENGINE_H_
