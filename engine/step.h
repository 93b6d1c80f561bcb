#ifndef LATENTD_ENGINE_STEP_H_
#define LATENTD_ENGINE_STEP_H_

#include <cstdint>
#include <optional>
#include <vector>

namespace latentd {

using TokenId = int32_t;     // index into the vocabulary
using BlockId = int32_t;     // index into one rank's latent KV cache
using RequestId = uint64_t;  // unique for the life of the process

inline constexpr int32_t kBlockSize = 64;  // tokens per KV cache block

// How one token is drawn from its logits. The order is: suppressed tokens out, temperature, top_k,
// top_p, min_p, draw. The ranges are checked at the door (server/), not here.
struct SamplingParams {
  float temperature = 1.0f;  // [0, 2]; 0 is greedy: the lowest id among the largest logits
  float top_p = 1.0f;        // (0, 1]; 1: no limit
  int32_t top_k = 0;         // >= 1; 0: no limit
  float min_p = 0.0f;        // [0, 1]; share of the likeliest token's probability; 0: no limit
  // The draw is a function of (seed, sample_index, position) alone, position being the index in the
  // sequence of the token that is drawn: batch, chunks, preemption and restarts change no draw.
  uint64_t seed = 0;
  int32_t sample_index = 0;  // which of a request's n answers
};

// One sequence's share of a step.
struct SequenceStep {
  RequestId id = 0;
  int32_t dp_rank = 0;              // attention replica that holds its cache
  int32_t num_computed_tokens = 0;  // tokens already in the cache
  int32_t num_tokens = 0;           // tokens to compute now, >= 1
  int32_t num_blocks = 0;           // ceil((num_computed_tokens + num_tokens) / kBlockSize)
  int32_t num_suppressed = 0;       // tokens that must not be drawn now (min_tokens)
  bool sample = false;              // draw the next token after the last one
  SamplingParams sampling = {};     // read only when `sample`
};

// The shape that every rank of a group gives a step, known from the plan: no rank has to ask
// another.
struct GroupShape {
  int32_t num_tokens = 0;     // of the rank that has most
  int32_t num_sequences = 0;  // likewise
  bool decode = false;        // every sequence of every rank has one token, and samples
};

// What the engine shall compute in one forward pass, on all ranks.
//
// A plan is a value: it holds no pointers and needs no earlier plan, so it can be logged, replayed,
// hashed and sent. Arrays are ragged, in the order of `sequences`. There is no "prefill" or
// "decode" here: a sequence simply has tokens that are not in the cache yet.
struct StepPlan {
  int64_t step = 0;                     // 0, 1, 2, ...
  std::vector<SequenceStep> sequences;  // [num_sequences]
  std::vector<TokenId> tokens;          // [sum of num_tokens]
  std::vector<BlockId> blocks;          // [sum of num_blocks]; the whole table, cached blocks too
  std::vector<TokenId> suppressed;      // [sum of num_suppressed]
  GroupShape shape = {};                // only in one rank's share of a plan (SplitPlan)

  bool empty() const { return sequences.empty(); }
};

// What an accelerator did, by its own clock.
struct DeviceTimes {
  double idle_seconds = 0;  // between the end of the step before and the begin of this one
  double busy_seconds = 0;  // from the begin of this step to its end
};

struct StepResult {
  std::vector<TokenId> sampled;                      // [sequences with sample], in plan order
  std::optional<DeviceTimes> device = std::nullopt;  // where the engine has one
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_STEP_H_
