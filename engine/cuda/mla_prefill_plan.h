#ifndef LATENTD_ENGINE_CUDA_MLA_PREFILL_PLAN_H_
#define LATENTD_ENGINE_CUDA_MLA_PREFILL_PLAN_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/cuda/mla_prefill.h"

namespace latentd {

// Keys that are expanded together, and the attention of queries to them. Offsets are in words of
// the plan.
struct MlaPrefillPart {
  int32_t num_rows = 0;  // of keys, a multiple of 128

  // PrefillKeys [num_sequences] of kernels/mla_prefill.h; key_offset is added to each first key.
  size_t sequences = 0;
  int32_t num_sequences = 0;
  int32_t key_offset = 0;

  // PrefillWork of kernels/mla_prefill.h: begin [num_sms + 1], then head, tile, query_begin,
  // num_queries, row_begin, num_keys [num_work] each.
  size_t work = 0;
  int32_t num_work = 0;
  bool causal = false;

  // The first part of its queries writes the result, later ones are merged into it.
  bool merge = false;
  bool more = false;  // of the same queries follow: their log-sum-exp is needed
  int32_t query_begin = 0;
  int32_t num_queries = 0;
};

// A step's attention as a list of parts and the words that their kernels read on the device.
struct MlaPrefillPlan {
  std::vector<MlaPrefillPart> parts;
  std::vector<int32_t> words;
};

// Rows of keys of the largest part.
int32_t MlaPrefillPartRows(const MlaPrefill::Options& options);

// The words of the largest plan.
size_t MaxMlaPrefillWords(const MlaPrefill::Options& options, int num_sms);

// Sequences that fit are packed into parts in their order. One that is longer than a part has parts
// of its own: first its last keys, with the chunk, then its context from the front.
// INVALID_ARGUMENT, naming the sequence, for what exceeds the options.
absl::Status PlanMlaPrefill(const MlaPrefill::Options& options, int num_sms,
                            absl::Span<const MlaPrefillSequence> sequences, MlaPrefillPlan* plan);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_MLA_PREFILL_PLAN_H_
