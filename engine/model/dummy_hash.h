#ifndef LATENTD_ENGINE_MODEL_DUMMY_HASH_H_
#define LATENTD_ENGINE_MODEL_DUMMY_HASH_H_

#include <cstdint>

namespace latentd {

// The 8 random bytes of elements counter .. counter + 7 of a dummy model's tensor
// (dummy_weights.h): SplitMix64's output function over a counter. On the GPU too.
constexpr uint64_t DummyHash(uint64_t tensor, uint64_t counter) {
  uint64_t x = (tensor << 40) + counter + 0x9e3779b97f4a7c15ull * (counter + 1);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_DUMMY_HASH_H_
