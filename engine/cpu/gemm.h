#ifndef LATENTD_ENGINE_CPU_GEMM_H_
#define LATENTD_ENGINE_CPU_GEMM_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "engine/cpu/aligned.h"
#include "engine/cpu/kernels.h"
#include "engine/cpu/packed_matrix.h"
#include "engine/cpu/thread_pool.h"

namespace latentd {

// The left side of one or more products.
struct GemmInput {
  const float* x = nullptr;  // [rows, stride] f32; readable and finite up to k rounded up to 32
  ptrdiff_t stride = 0;
  int rows = 0;  // may be 0
  int k = 0;
};

// out[rows, n] = inputs[input] * matrix^T + bias.
struct GemmJob {
  int input = 0;
  const PackedMatrix* matrix = nullptr;  // with quantize_input: the input is rounded to FP8 first
  float* out = nullptr;                  // [rows, out_stride] f32
  ptrdiff_t out_stride = 0;
};

// Runs products side by side on all threads. Not thread-safe: it owns the scratch memory.
class Gemm {
 public:
  Gemm(const Kernels& kernels, ThreadPool& pool) : kernels_(kernels), pool_(pool) {}

  // All jobs in one parallel loop (two when the kernels want split inputs).
  void Run(absl::Span<const GemmInput> inputs, absl::Span<const GemmJob> jobs);

  // One product.
  void Run(const GemmInput& input, const PackedMatrix& matrix, float* out, ptrdiff_t out_stride);

 private:
  void RunProducts(absl::Span<const GemmInput> inputs, absl::Span<const GemmJob> jobs);
  void Quantize(absl::Span<const GemmInput> inputs, absl::Span<const GemmJob> jobs);
  void Split(absl::Span<const GemmInput> inputs);

  const Kernels& kernels_;
  ThreadPool& pool_;
  AlignedVector<uint16_t> split_;      // the inputs as Kernels::split_rows writes them
  std::vector<size_t> split_offsets_;  // [inputs] elements into split_
  std::vector<int64_t> first_tasks_;   // [jobs + 1]
  // What Quantize() leaves: inputs and jobs in which each job reads the input that it wants.
  AlignedVector<float> quantized_;
  std::vector<GemmInput> quantized_inputs_;
  std::vector<GemmJob> quantized_jobs_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_GEMM_H_
