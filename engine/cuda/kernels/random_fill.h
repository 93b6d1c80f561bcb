#ifndef LATENTD_ENGINE_CUDA_KERNELS_RANDOM_FILL_H_
#define LATENTD_ENGINE_CUDA_KERNELS_RANDOM_FILL_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace latentd {

// A rectangle of a dummy model's tensor (engine/model/dummy_weights.h), made where it belongs. Rows
// come in blocks as those of WeightCopy (gpu_layout.h): element (row, col) is that of the tensor at
// row row_begin + row / block_rows * source_block_rows + row % block_rows, column col_begin + col.
struct RandomFillArgs {
  uint64_t tensor = 0;  // its number
  const void* values =
      nullptr;             // device, [256] of element_bytes each: what a random byte stands for
  int element_bytes = 0;   // 1, 2 or 4
  void* target = nullptr;  // aligned to 16 bytes
  int64_t num_rows = 0, num_cols = 0;
  int64_t source_cols = 0, row_begin = 0, col_begin = 0;
  int64_t block_rows = 0, source_block_rows = 0, target_block_rows = 0;
  int64_t target_cols = 0;  // from row to row of the target
};
cudaError_t RandomFill(const RandomFillArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_RANDOM_FILL_H_
