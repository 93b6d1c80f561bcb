#ifndef LATENTD_TESTS_ENGINE_CUDA_MLA_CACHE_DATA_H_
#define LATENTD_TESTS_ENGINE_CUDA_MLA_CACHE_DATA_H_

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "engine/cuda/kernels/mla_cache.h"

namespace latentd {

// A layer's latent cache on the host. What no row was written to is NaN: in FP8 latents (bytes 0x7f
// and 0xff), rotated dims and scales.
class HostMlaCache {
 public:
  using Row = std::array<float, kMlaKeyDim>;

  HostMlaCache() = default;
  HostMlaCache(CacheFormat format, int64_t num_blocks)
      : HostMlaCache(format, std::vector<std::byte>(num_blocks * MlaCacheBlockBytes(format),
                                                    std::byte{0xff})) {
    if (format != CacheFormat::kFp8) return;
    for (int64_t b = 0; b < num_blocks; ++b) {
      const int64_t begin = MlaFp8BlockOffset(b * kMlaBlockKeys);
      for (int i = 0; i < kMlaFp8RopeOffset; i += 3) bytes_[begin + i] = std::byte{0x7f};
    }
  }
  HostMlaCache(CacheFormat format, std::vector<std::byte> bytes)
      : format_(format), bytes_(std::move(bytes)) {}

  CacheFormat format() const { return format_; }
  const std::vector<std::byte>& bytes() const { return bytes_; }

  void Set(int64_t slot, const Row& row) {
    float amax = 1e-10f;
    for (int i = 0; i < kMlaLatentDim; ++i) amax = std::max(amax, std::fabs(row[i]));
    Set(slot, row, std::exp2(std::ceil(std::log2(amax / 448))));
  }
  // `scale`: of FP8.
  void Set(int64_t slot, const Row& row, float scale) {
    for (int i = 0; i < kMlaKeyDim; ++i) {
      if (format_ == CacheFormat::kFp8 && i < kMlaLatentDim) {
        bytes_[Offset(slot, i)] =
            std::byte{__nv_cvt_float_to_fp8(row[i] / scale, __NV_SATFINITE, __NV_E4M3)};
      } else {
        const float value = format_ == CacheFormat::kFp8 ? row[i] / scale : row[i];
        const __nv_bfloat16 rounded = __float2bfloat16(value);
        std::memcpy(&bytes_[Offset(slot, i)], &rounded, sizeof(rounded));
      }
    }
    if (format_ == CacheFormat::kFp8)
      std::memcpy(&bytes_[MlaFp8ScaleOffset(slot)], &scale, sizeof(scale));
  }

  float Scale(int64_t slot) const {
    float scale = 1;
    if (format_ == CacheFormat::kFp8)
      std::memcpy(&scale, &bytes_[MlaFp8ScaleOffset(slot)], sizeof(scale));
    return scale;
  }
  // What a kernel reads there.
  Row Get(int64_t slot) const {
    const float scale = Scale(slot);
    Row row;
    for (int i = 0; i < kMlaKeyDim; ++i) {
      if (format_ == CacheFormat::kFp8 && i < kMlaLatentDim) {
        __nv_fp8_e4m3 value;
        value.__x = static_cast<uint8_t>(bytes_[Offset(slot, i)]);
        row[i] = static_cast<float>(value) * scale;
      } else {
        __nv_bfloat16 value;
        std::memcpy(static_cast<void*>(&value), &bytes_[Offset(slot, i)], sizeof(value));
        row[i] = __bfloat162float(value) * scale;
      }
    }
    return row;
  }
  // All bytes of the row are 0xff.
  bool IsUntouched(int64_t slot) const {
    for (int i = 0; i < kMlaKeyDim; ++i)
      if (bytes_[Offset(slot, i)] != std::byte{0xff}) return false;
    return format_ != CacheFormat::kFp8 || bytes_[MlaFp8ScaleOffset(slot)] == std::byte{0xff};
  }

 private:
  int64_t Offset(int64_t slot, int column) const {
    if (format_ == CacheFormat::kBf16) return MlaBf16Offset(slot) + 2 * column;
    return column < kMlaLatentDim ? MlaFp8LatentsOffset(slot) + column
                                  : MlaFp8RopeOffset(slot) + 2 * (column - kMlaLatentDim);
  }

  CacheFormat format_ = CacheFormat::kBf16;
  std::vector<std::byte> bytes_;
};

inline const char* FormatName(CacheFormat format) {
  return format == CacheFormat::kFp8 ? "fp8" : "bf16";
}

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_MLA_CACHE_DATA_H_
