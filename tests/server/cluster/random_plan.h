#ifndef LATENTD_TESTS_SERVER_CLUSTER_RANDOM_PLAN_H_
#define LATENTD_TESTS_SERVER_CLUSTER_RANDOM_PLAN_H_

#include <cstdint>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/step.h"
#include "server/cluster/plan_codec.h"

namespace latentd {

// Well-formed, and otherwise anything: the ids are of no model.
inline StepPlan RandomPlan(std::mt19937_64* random) {
  const auto draw = [random](int64_t end) {
    return static_cast<int32_t>((*random)() % static_cast<uint64_t>(end));
  };
  StepPlan plan;
  plan.step = static_cast<int64_t>((*random)());
  plan.sequences.resize(draw(12));
  for (SequenceStep& sequence : plan.sequences) {
    sequence = {.id = (*random)(),
                .dp_rank = draw(16),
                .num_computed_tokens = draw(1 << 20),
                .num_tokens = draw(9),
                .num_blocks = draw(5),
                .num_suppressed = draw(3),
                .sample = draw(2) == 1,
                .sampling = {.temperature = static_cast<float>(draw(200)) / 100,
                             .top_p = static_cast<float>(draw(100) + 1) / 100,
                             .top_k = draw(100),
                             .min_p = static_cast<float>(draw(100)) / 100,
                             .seed = (*random)(),
                             .sample_index = draw(8)}};
    for (int i = 0; i < sequence.num_tokens; ++i) plan.tokens.push_back(draw(1 << 30));
    for (int i = 0; i < sequence.num_blocks; ++i) plan.blocks.push_back(draw(1 << 30));
    for (int i = 0; i < sequence.num_suppressed; ++i) plan.suppressed.push_back(draw(1 << 30));
  }
  plan.shape = {
      .num_tokens = draw(1 << 20), .num_sequences = draw(1 << 20), .decode = draw(2) == 1};
  return plan;
}

inline StepResult RandomResult(std::mt19937_64* random) {
  StepResult result;
  result.sampled.resize((*random)() % 20);
  for (TokenId& token : result.sampled) token = static_cast<TokenId>((*random)());
  if ((*random)() % 2 == 0) {
    result.device = {.idle_seconds = static_cast<double>((*random)()),
                     .busy_seconds = static_cast<double>((*random)())};
  }
  return result;
}

inline std::string Encoded(const StepPlan& plan) {
  std::string bytes(EncodedPlanSize(plan), '\0');
  EncodePlan(plan, bytes.data());
  return bytes;
}

inline std::string Encoded(const StepResult& result) {
  std::string bytes(EncodedResultSize(result), '\0');
  EncodeResult(result, bytes.data());
  return bytes;
}

// Every field, to compare and to print.
inline std::string Text(const StepPlan& plan) {
  std::string text = absl::StrCat("step ", plan.step, " shape ", plan.shape.num_tokens, " ",
                                  plan.shape.num_sequences, " ", plan.shape.decode);
  for (const SequenceStep& s : plan.sequences) {
    absl::StrAppend(&text, "\n", s.id, " ", s.dp_rank, " ", s.num_computed_tokens, " ",
                    s.num_tokens, " ", s.num_blocks, " ", s.num_suppressed, " ", s.sample);
    absl::StrAppend(&text, " | ", s.sampling.temperature, " ", s.sampling.top_p, " ",
                    s.sampling.top_k, " ", s.sampling.min_p, " ", s.sampling.seed, " ",
                    s.sampling.sample_index);
  }
  absl::StrAppend(&text, "\ntokens ", absl::StrJoin(plan.tokens, " "), "\nblocks ",
                  absl::StrJoin(plan.blocks, " "), "\nsuppressed ",
                  absl::StrJoin(plan.suppressed, " "));
  return text;
}

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_CLUSTER_RANDOM_PLAN_H_
