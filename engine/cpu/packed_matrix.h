#ifndef LATENTD_ENGINE_CPU_PACKED_MATRIX_H_
#define LATENTD_ENGINE_CPU_PACKED_MATRIX_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "engine/cpu/kernels.h"
#include "engine/cpu/quantize_row.h"
#include "engine/cpu/thread_pool.h"
#include "engine/model/weights.h"

namespace latentd {

// Memory for the packed weights: few, large, 2 MiB aligned pieces, so that huge pages can back
// them.
class Arena {
 public:
  // `bytes` of zeros, aligned to 64. Null when the system has no memory.
  std::byte* Allocate(size_t bytes);
  size_t bytes_used() const { return bytes_used_; }

 private:
  struct Free {
    void operator()(std::byte* piece) const;
  };
  std::vector<std::unique_ptr<std::byte, Free>> pieces_;
  std::byte* next_ = nullptr;
  size_t left_ = 0;
  size_t bytes_used_ = 0;
};

// The matrix W [n, k] of y = x W^T + bias, laid out for GemmPanel: panels of 32 rows of W.
//
// bf16 and FP8 weights are held as bf16, which both convert to exactly; the FP8 scales stay apart
// and are applied to the sum over their block. f32 weights are held as f32, and so are FP8 weights
// whose blocks do not fit the panels, or that share a matrix with others.
struct PackedMatrix {
  int n = 0;
  int k = 0;                       // true k
  int k_padded = 0;                // multiple of kRowPadding
  int group = 0;                   // k of one scale; k_padded without scales
  const uint16_t* bf16 = nullptr;  // [ceil(n / 32), k_padded / 2, 32, 2], or null
  const float* f32 = nullptr;      // [ceil(n / 32), k_padded, 32], or null
  const float* scales = nullptr;   // [ceil(n / 32), k_padded / group, 32], or null
  const float* bias = nullptr;     // [n], or null
  std::optional<ActivationQuantization> quantize_input;  // what x is rounded to before the product

  int num_panels() const { return (n + kPanelCols - 1) / kPanelCols; }
};

// A part of a projection, to be packed: rows [row_begin, row_begin + n) of `linear`, as they are
// ([n, in_features]) or transposed ([in_features, n]).
struct MatrixPart {
  const LinearWeight* linear = nullptr;
  int64_t row_begin = 0;
  int64_t num_rows = 0;
  bool transposed = false;
};

// Packs the parts below one another (they share k). Null data means that memory ran out.
PackedMatrix Pack(const std::vector<MatrixPart>& parts,
                  const std::optional<Fp8Quantization>& quantization, ThreadPool& pool,
                  Arena& arena);

// Bytes that Pack will take for an [n, k] matrix of `dtype`.
size_t PackedBytes(int64_t n, int64_t k, DType dtype);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_PACKED_MATRIX_H_
