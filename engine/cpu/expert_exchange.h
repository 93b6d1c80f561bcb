#ifndef LATENTD_ENGINE_CPU_EXPERT_EXCHANGE_H_
#define LATENTD_ENGINE_CPU_EXPERT_EXCHANGE_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/comm/communicator.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"

namespace latentd {

// Activations and the experts that they go to.
struct RoutedRows {
  const float* x = nullptr;          // [rows, x_stride], hidden_size of them valid
  ptrdiff_t x_stride = 0;            // in floats
  const int32_t* experts = nullptr;  // [rows, num_experts_per_tok]
  int rows = 0;
};

// What experts gave for RoutedRows: the output of row i's j-th expert, weight not applied, is
// outputs[places[i * num_experts_per_tok + j]]; a place of -1 has none here.
struct ExpertOutputs {
  float* outputs = nullptr;  // [any number, hidden_size]
  const int32_t* places = nullptr;
};

// The two calls that put a layer's routed experts on other ranks: Dispatch() brings every row to
// the ranks that hold its experts, Combine() brings the outputs back.
//
// What comes back is each expert's output by itself, not a rank's sum of them. A sum's last bits
// depend on how its terms are grouped; so the row's own rank adds them, in the order of the
// experts, as a model that is alone does, and the result is the same bits for every number of
// ranks. (A GPU's rank gives one partial sum a row: k times less to send, and another grouping for
// each number of ranks.)
//
// Both are collective: all ranks call them for every MoE layer of every tile, without rows too, and
// so agree on the order and the sizes of what is sent. An error is the communicator's, and final as
// its header says. One thread at a time.
class ExpertExchange {
 public:
  // The rows of a tile that take no more than this, those of all ranks together, are sent to
  // everybody. Above, a row goes only where it is wanted, and a round trip more says how many do.
  static constexpr size_t kGatherBytes = size_t{256} << 10;

  // The arguments must outlive it. `gather_bytes`: the same on all ranks.
  ExpertExchange(const ModelConfig& config, ThreadPool& pool, Communicator& communicator,
                 size_t gather_bytes = kGatherBytes);

  // The calls that follow are for a tile of which no rank has more than `most_rows` rows: the same
  // on all ranks, >= 1.
  void BeginTile(int most_rows) { most_rows_ = most_rows; }

  // This rank's rows to those that hold their experts. Returns the rows that came here, this rank's
  // own among them, until the next Dispatch(); some of a row's experts may be other ranks', and -1
  // is none. `own` must stay as it is until Combine() returns.
  absl::StatusOr<RoutedRows> Dispatch(const RoutedRows& own);

  // The outputs of this rank's experts, for the rows that Dispatch() returned, to the ranks of
  // those rows. Returns the outputs of all experts for Dispatch()'s `own`, until the next
  // Combine().
  absl::StatusOr<ExpertOutputs> Combine(const ExpertOutputs& computed);

  // Its buffers for each row of the largest tile, at most.
  static uint64_t NumFloats(const ModelConfig& config, const Placement& placement);

 private:
  absl::Status GatherRows();
  absl::Status SendRows();
  absl::Status ExchangeCounts();
  void PackRow(int row, float* to) const;

  const ModelConfig& config_;
  ThreadPool& pool_;
  Communicator& communicator_;
  const size_t gather_bytes_;
  const int num_ranks_;
  const size_t row_floats_;   // of a row on its way: hidden_size, then the bits of its experts
  std::vector<int> rank_of_;  // [n_routed_experts]
  int most_rows_ = 1;
  RoutedRows own_;

  std::vector<std::vector<int32_t>> rows_to_;  // [ranks] which of own_'s rows go there
  std::vector<int32_t> counts_;                // [ranks, ranks] rows from, to
  std::vector<int32_t> first_rows_;            // [ranks + 1] of each rank among the rows that came
  AlignedVector<float> rows_out_;              // [rows, row_floats], by rank
  AlignedVector<float> rows_in_;               // likewise
  std::vector<int32_t> experts_in_;            // [rows that came, num_experts_per_tok]

  std::vector<int32_t> sources_;      // [outputs_out_] places among the computed
  std::vector<int32_t> places_;       // [rows, num_experts_per_tok] in outputs_in_
  AlignedVector<float> outputs_out_;  // [outputs, hidden_size], by rank, then row, then expert
  AlignedVector<float> outputs_in_;   // likewise
  std::vector<absl::Span<const std::byte>> to_;  // [ranks]
  std::vector<absl::Span<std::byte>> from_;      // [ranks]
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_EXPERT_EXCHANGE_H_
