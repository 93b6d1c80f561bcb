#ifndef LATENTD_ENGINE_SAMPLING_H_
#define LATENTD_ENGINE_SAMPLING_H_

#include <array>
#include <cstdint>

namespace latentd {

// Philox4x32-10 (Salmon et al., SC11): four random words that are a function of counter and key
// alone. The known-answer vectors of Random123 hold.
std::array<uint32_t, 4> Philox4x32(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);

// The uniform number in [0, 1) that draws the token at `position` (its index in the sequence) of
// answer `sample_index` of a request with `seed`. A multiple of 2^-53. Every engine draws with it:
//   key      (low, high word of seed)
//   counter  (low, high word of position, sample_index, 0)
//   result   the upper 53 bits of words (1, 0) of the output
double UniformDraw(uint64_t seed, int32_t sample_index, int64_t position);

}  // namespace latentd

#endif  // LATENTD_ENGINE_SAMPLING_H_
