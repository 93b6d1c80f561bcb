#ifndef LATENTD_ENGINE_CUDA_KERNELS_MLA_CACHE_H_
#define LATENTD_ENGINE_CUDA_KERNELS_MLA_CACHE_H_

#include <cstddef>
#include <cstdint>

#include "engine/model/cache_format.h"

namespace latentd {

// A layer's latent cache on the device, in blocks of 64 tokens, aligned to 128 bytes. A token has
// 512 latents and 64 rotated dims.
//
//   kBf16: [64, 576] bf16, the latents first
//   kFp8:  latents [64, 512] e4m3 | rotated dims [64, 64] bf16 | scales [64] f32
//
// In FP8 a token's row is its scale times what is stored, for the rotated dims too. Scales are
// powers of two, so that bf16 holds each element exactly: the rotated dims lose nothing, and no
// product with a scale is rounded. A row that no token has written is NaN, in FP8 its scale.
struct MlaCache {
  std::byte* data = nullptr;
  CacheFormat format = CacheFormat::kBf16;  // or kFp8
};

inline constexpr int kMlaBlockKeys = 64;
inline constexpr int kMlaLatentDim = 512;
inline constexpr int kMlaRopeDim = 64;
inline constexpr int kMlaKeyDim = kMlaLatentDim + kMlaRopeDim;

inline constexpr int kMlaFp8RopeOffset = kMlaBlockKeys * kMlaLatentDim;
inline constexpr int kMlaFp8ScaleOffset = kMlaFp8RopeOffset + kMlaBlockKeys * kMlaRopeDim * 2;

constexpr int64_t MlaCacheBlockBytes(CacheFormat format) {
  return kMlaBlockKeys * CacheTokenBytes(format, kMlaLatentDim, kMlaRopeDim);
}

// Bytes from the cache's begin to what it holds of a token, whose slot is its block * 64 + the
// place there.
constexpr int64_t MlaBf16Offset(int64_t slot) { return slot * kMlaKeyDim * 2; }
constexpr int64_t MlaFp8BlockOffset(int64_t slot) {
  return slot / kMlaBlockKeys * MlaCacheBlockBytes(CacheFormat::kFp8);
}
constexpr int64_t MlaFp8LatentsOffset(int64_t slot) {
  return MlaFp8BlockOffset(slot) + slot % kMlaBlockKeys * kMlaLatentDim;
}
constexpr int64_t MlaFp8RopeOffset(int64_t slot) {
  return MlaFp8BlockOffset(slot) + kMlaFp8RopeOffset + slot % kMlaBlockKeys * kMlaRopeDim * 2;
}
constexpr int64_t MlaFp8ScaleOffset(int64_t slot) {
  return MlaFp8BlockOffset(slot) + kMlaFp8ScaleOffset + slot % kMlaBlockKeys * 4;
}

static_assert(MlaCacheBlockBytes(CacheFormat::kFp8) == kMlaFp8ScaleOffset + kMlaBlockKeys * 4);
static_assert(MlaCacheBlockBytes(CacheFormat::kFp8) % 128 == 0);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_MLA_CACHE_H_
