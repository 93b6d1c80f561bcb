#ifndef LATENTD_ENGINE_CUDA_GPU_STAGING_H_
#define LATENTD_ENGINE_CUDA_GPU_STAGING_H_

#include <cstddef>
#include <cstdint>
#include <functional>

#include "absl/status/status.h"
#include "engine/cuda/gpu_layout.h"

namespace latentd {

// A WeightCopy goes in pieces, each by way of a buffer on the host. Nothing here calls CUDA.

// Rows of a copy that one piece of it takes, so that neither their stored nor their final form is
// larger than `bytes`: whole blocks, at least one.
int64_t PieceRows(const WeightCopy& copy, size_t bytes);

// Bytes of so many rows in their stored or their final form, whichever is larger.
size_t PieceBytes(const WeightCopy& copy, int64_t rows);

// Reads bytes of a stored tensor.
using ReadBytes = std::function<absl::Status(const std::byte* begin, size_t size, std::byte* out)>;

// Puts rows [begin, end) of a copy into `out` [end - begin, num_cols] target_dtype; begin is at a
// block. `scratch`: room for their stored form, used when the elements change.
absl::Status StageRows(const WeightCopy& copy, int64_t begin, int64_t end, const ReadBytes& read,
                       std::byte* scratch, std::byte* out);

// Where those rows go: `height` runs of `width` bytes, `pitch` bytes from one to the next.
struct RowTarget {
  std::byte* target = nullptr;
  size_t pitch = 0;
  size_t width = 0;
  size_t height = 0;
};
RowTarget PlaceRows(const WeightCopy& copy, int64_t begin, int64_t end);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GPU_STAGING_H_
