#ifndef LATENTD_ENGINE_CUDA_STEP_INPUT_H_
#define LATENTD_ENGINE_CUDA_STEP_INPUT_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/kernels/mla_decode.h"
#include "engine/cuda/kernels/sampler.h"
#include "engine/cuda/mla_prefill.h"
#include "engine/cuda/step_buffers.h"
#include "engine/step.h"

namespace latentd {

// What the launches of a step depend on; all else is read on the device. A captured graph serves
// every step of its shape.
struct StepShape {
  int rows = 0;           // tokens, with the padding
  int absorbed_rows = 0;  // the first of them: their attention is MlaDecode's
  int sequences = 0;      // with absorbed rows, with the padding
  int piece_tokens = 0;   // tokens whose MLPs are computed together, in a group of each rank
  // Rows that the pieces cover: `rows`, in a group the padded rows that all ranks send.
  int exchange_rows = 0;
  // The samples of piece i are [piece_samples[i], piece_samples[i + 1]).
  std::vector<int> piece_samples = {0};

  int pieces() const { return static_cast<int>(piece_samples.size()) - 1; }
  int samples() const { return piece_samples.back(); }

  // `sequences` sequences with one token each, all of them sampled; pieces of up to `most_tokens`.
  static StepShape Decode(int sequences, int most_tokens);
};

// A step's input where it lies, on the host or on the device.
struct StepArrays {
  int32_t* num_real_tokens = nullptr;  // [pieces] of each piece's rows; the rest is padding
  int32_t* tokens = nullptr;           // [rows]
  int32_t* positions = nullptr;        // [rows]
  int64_t* slots = nullptr;            // [rows] of the cache; -1: padding
  int32_t* block_begin = nullptr;      // [sequences] with absorbed rows: their tables in `ids`
  int32_t* decode_plan = nullptr;      // MlaDecodePlanner's
  int32_t* sample_rows = nullptr;      // [samples] row within its piece
  SampleRow* samples = nullptr;        // [samples]
  int32_t* ids = nullptr;              // block tables, then suppressed tokens; of any length
};

// Lays a plan out for the kernels: one pinned buffer, one copy to the device.
//
// Rows are the plan's tokens with the sequences in another order: those with absorbed attention
// first. The arrays lie where the shape alone says, so that a graph finds them.
class StepInput {
 public:
  static absl::StatusOr<std::unique_ptr<StepInput>> Create(
      const StepLimits& limits, const MlaDecodePlanner::Options& planner);

  static size_t DeviceBytes(const StepLimits& limits, const MlaDecodePlanner::Options& planner);

  // Writes the pinned buffer; the copy of the plan before has ended. `graph_rows`: the rows of the
  // padded decode step that the plan is to run as; 0: no padding. In a group plan.shape says what
  // the ranks exchange. INVALID_ARGUMENT when there are too many suppressed tokens. REQUIRES:
  // PlanCheck has passed the plan.
  absl::Status Stage(const StepPlan& plan, int graph_rows);
  // A padded decode step without sequences.
  void StageNothing(int graph_rows);

  absl::Status Upload(cudaStream_t stream);

  const StepShape& shape() const { return shape_; }
  StepArrays device(const StepShape& shape) const;
  absl::Span<const MlaPrefillSequence> prefill_sequences() const { return prefill_sequences_; }
  absl::Span<const int64_t> host_slots() const { return {host_.slots, num_tokens_}; }

  // Where the plan has what is here row, or sample, i.
  absl::Span<const int32_t> plan_rows() const { return plan_rows_; }
  absl::Span<const int32_t> plan_samples() const { return plan_samples_; }

 private:
  // One sequence of the plan and where its parts begin in the plan's arrays.
  struct Item {
    const SequenceStep* sequence = nullptr;
    int32_t first_token = 0;
    int32_t first_block = 0;
    int32_t first_suppressed = 0;
    int32_t sample = 0;  // among the plan's
  };

  StepInput(const StepLimits& limits, const MlaDecodePlanner::Options& planner);

  StepArrays Arrays(const StepShape& shape, std::byte* data) const;
  void Begin(const StepShape& shape);
  void Order(const StepPlan& plan);
  StepShape Decode(int rows) const { return StepShape::Decode(rows, limits_.piece_tokens); }
  StepShape ShapeOf(const StepPlan& plan, int graph_rows) const;
  void WriteSequence(const StepPlan& plan, const Item& item, bool absorbed);
  void WriteSample(const Item& item, int row);
  void WriteSuppressed(const StepPlan& plan);
  void Finish();

  const StepLimits limits_;
  const MlaDecodePlanner planner_;
  PinnedMemory pinned_;
  DeviceMemory device_;

  StepShape shape_;
  StepArrays host_;
  std::vector<Item> absorbed_, prefill_;
  std::vector<MlaSequence> decode_sequences_;
  std::vector<MlaPrefillSequence> prefill_sequences_;
  std::vector<int32_t> decode_plan_;
  std::vector<int32_t> plan_rows_;
  std::vector<int32_t> plan_samples_;
  std::vector<Item> sampled_;
  size_t num_tokens_ = 0;  // written
  int32_t num_ids_ = 0;    // written
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_STEP_INPUT_H_
