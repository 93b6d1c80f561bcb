#ifndef LATENTD_ENGINE_CPU_SAMPLER_H_
#define LATENTD_ENGINE_CPU_SAMPLER_H_

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/step.h"

namespace latentd {

// Draws one token from a row of logits, as step.h's SamplingParams says. In order:
//   1. suppressed tokens are taken out
//   2. temperature 0: the answer is the lowest id among the largest logits; the rest does not apply
//   3. weight of a token = exp((logit - largest logit) / temperature)
//   4. top_k: the k tokens of the largest logits stay; the lower id first on a tie
//   5. top_p: in the order of 4, the shortest run whose weight is >= top_p of all that is left
//   stays
//   6. min_p: tokens of weight >= min_p stay (the likeliest has weight 1)
//   7. the token, in the order of ids, at which the running sum of weights passes
//      UniformDraw(seed, sample_index, position) of their sum
// Sums are in double. Weights below exp(-45) are taken as 0.
//
// Holds scratch memory only: the result is a function of the arguments. One thread at a time.
class Sampler {
 public:
  // `logits` [vocab_size] are changed. INTERNAL when a logit is not finite; INVALID_ARGUMENT when
  // every token is suppressed. REQUIRES: suppressed ids are within the vocabulary.
  absl::StatusOr<TokenId> Sample(absl::Span<float> logits, absl::Span<const TokenId> suppressed,
                                 const SamplingParams& params, int64_t position);

 private:
  struct Candidate {
    float logit;
    TokenId id;
    double weight;
  };
  static bool Before(const Candidate& a, const Candidate& b);
  void KeepTopP(double top_p);

  std::vector<Candidate> candidates_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_SAMPLER_H_
