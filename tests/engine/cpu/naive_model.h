#ifndef LATENTD_TESTS_ENGINE_CPU_NAIVE_MODEL_H_
#define LATENTD_TESTS_ENGINE_CPU_NAIVE_MODEL_H_

#include <vector>

#include "engine/model/config.h"
#include "engine/model/weights.h"
#include "engine/step.h"

namespace latentd {

// DeepSeek-V3 written down as in the papers: expanded keys and values for every head (naive MLA),
// one token and one expert at a time, sums in double, no cache, no kernels. The oracle of the
// engine's absorbed form for weights that Transformers has not seen.
//
// Returns the logits of every token: [tokens, vocab_size].
std::vector<float> NaiveLogits(const ModelConfig& config, const ModelWeights& weights,
                               const std::vector<TokenId>& tokens);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CPU_NAIVE_MODEL_H_
