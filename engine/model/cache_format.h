#ifndef LATENTD_ENGINE_MODEL_CACHE_FORMAT_H_
#define LATENTD_ENGINE_MODEL_CACHE_FORMAT_H_

#include <cstdint>

namespace latentd {

// How the rows of the latent cache are held.
enum class CacheFormat {
  kF32,
  kBf16,
  kFp8,  // latents in FP8 e4m3, rotated dims in bf16, an f32 scale for each token
};

// Of one layer, in a whole block.
constexpr int64_t CacheTokenBytes(CacheFormat format, int64_t latents, int64_t rotated_dims) {
  switch (format) {
    case CacheFormat::kF32:
      return 4 * (latents + rotated_dims);
    case CacheFormat::kBf16:
      return 2 * (latents + rotated_dims);
    case CacheFormat::kFp8:
      return latents + 2 * rotated_dims + 4;
  }
  return 0;
}

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_CACHE_FORMAT_H_
