#ifndef LATENTD_ENGINE_CUDA_STEP_TRACE_H_
#define LATENTD_ENGINE_CUDA_STEP_TRACE_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "engine/cuda/kernels/mla_cache.h"
#include "engine/cuda/kernels/moe.h"
#include "engine/trace_sink.h"

namespace latentd {

// Hands tensors of a step to a TraceSink, as f32 and in the order of the plan. Waits for the stream
// at each: for tests. The names are those of engine/cpu's forward pass. Of a step in several pieces
// (StepShape) the experts are reported piece by piece in the engine's own order.
class StepTrace {
 public:
  // `plan_rows[i]`: the row of the plan that row i of the step is.
  StepTrace(TraceSink* sink, absl::Span<const int32_t> plan_rows,
            absl::Span<const int32_t> plan_samples, absl::Span<const int64_t> slots,
            cudaStream_t stream)
      : sink_(sink),
        plan_rows_(plan_rows),
        plan_samples_(plan_samples),
        slots_(slots),
        stream_(stream) {}

  absl::Status Embedding(const float* residual, int hidden_size);
  // A tensor [rows, stride] on the device with `columns` valid.
  absl::Status Rows(std::string_view name, int layer, const __nv_bfloat16* data, int columns,
                    int64_t stride);
  // The latents and rope keys that the step has written.
  absl::Status Cache(int layer, const MlaCache& cache);
  // `rows` tokens from the step's token `begin` on.
  absl::Status Experts(int layer, const MoeRouting& routing, int begin, int rows, int k);
  // The residual between a layer's halves, and behind it.
  // BeforeMlp: of `rows` tokens from the step's token `begin` on.
  absl::Status BeforeMlp(const float* residual, int hidden_size, int begin, int rows);
  absl::Status AfterMlp(int layer, const float* residual, int hidden_size);
  absl::Status FinalHidden(const __nv_bfloat16* last, int hidden_size);
  // Samples [begin, begin + rows) of the step.
  absl::Status Logits(const float* logits, int begin, int rows, int vocab_size);

 private:
  absl::StatusOr<std::vector<float>> ReadCacheRow(const MlaCache& cache, int64_t slot);
  template <typename T>
  absl::StatusOr<std::vector<T>> Read(const T* device, int64_t count);
  void Report(std::string_view name, int layer, absl::Span<const float> data, int columns,
              int64_t stride, absl::Span<const int32_t> order);

  TraceSink* sink_;
  absl::Span<const int32_t> plan_rows_;
  absl::Span<const int32_t> plan_samples_;
  absl::Span<const int64_t> slots_;
  cudaStream_t stream_;
  std::vector<float> before_mlp_;  // [rows, hidden_size]
  std::vector<float> logits_;      // [samples, vocab_size]
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_STEP_TRACE_H_
