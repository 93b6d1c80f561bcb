#ifndef LATENTD_ENGINE_CUDA_GPU_LAYOUT_H_
#define LATENTD_ENGINE_CUDA_GPU_LAYOUT_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/cuda/gpu_weights.h"
#include "engine/model/config.h"
#include "engine/model/placement.h"
#include "engine/model/weights.h"

namespace latentd {

// Where each tensor of a checkpoint lies in GpuWeights. Host arithmetic: nothing here calls CUDA,
// and addresses of the GPU are never followed.

// All pointers and shapes of GpuWeights; `memory` is the caller's to fill. Routers have the type
// that they are stored in, or config.json's dtype without `stored`. A rank has room for the experts
// of its placement alone.
GpuWeights LayOutWeights(const ModelConfig& config, int32_t max_model_len,
                         const ModelWeights* stored, Carver& carver,
                         const Placement& placement = {});

// A rectangle of a stored matrix and its place. Its rows come in blocks, of which either side may
// have others in between: block b begins at row `row_begin + b * source_block_rows` of the source
// and at row `b * target_block_rows` of the target.
struct WeightCopy {
  const TensorView* source = nullptr;     // [rows, cols]; a vector counts as [size, 1]
  const TensorView* scale_inv = nullptr;  // FP8 that is to be dequantised: of 128 x 128 each
  int64_t row_begin = 0;
  int64_t num_rows = 0;
  int64_t col_begin = 0;
  int64_t num_cols = 0;
  int64_t block_rows = 0;  // num_rows is a multiple of it
  int64_t source_block_rows = 0;
  int64_t target_block_rows = 0;
  int64_t target_cols = 0;  // from row to row of the target; with several blocks it is num_cols
  DType target_dtype = DType::kBF16;
  std::byte* target = nullptr;

  int64_t source_cols() const { return source->shape.size() == 1 ? 1 : source->shape[1]; }
  int64_t source_row(int64_t row) const {
    return row_begin + row / block_rows * source_block_rows + row % block_rows;
  }
  // Whether elements change on the way.
  bool converts() const { return source->dtype != target_dtype; }
};

// What fills `gpu`, which LayOutWeights() made of the same weights. Views of `stored` need no data,
// but must stay where they are. Bytes that no copy writes (paddings of scales) are to be zero; the
// RoPE tables are not among them.
std::vector<WeightCopy> PlanCopies(const ModelConfig& config, const ModelWeights& stored,
                                   const GpuWeights& gpu, const Placement& placement = {});

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GPU_LAYOUT_H_
