#ifndef LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_H_
#define LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace latentd {

// What one row's draw needs. SamplingParams of engine/step.h, flat.
struct SampleRow {
  uint64_t seed = 0;
  int64_t position = 0;  // index in its sequence of the token to draw
  float temperature = 0;
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;
  int32_t sample_index = 0;
  int32_t suppressed_begin = 0;  // [begin, end) of `suppressed`
  int32_t suppressed_end = 0;
  int32_t reserved = 0;
};

struct SampleArgs {
  const float* logits = nullptr;  // [num_rows, vocab_size] f32
  int num_rows = 0;
  int vocab_size = 0;
  const SampleRow* rows = nullptr;      // [num_rows]
  const int32_t* suppressed = nullptr;  // token ids
  std::byte* workspace = nullptr;       // SamplerWorkspaceBytes()
  // [num_rows]: the token; kNotFinite if the row holds a NaN or an infinity, kAllSuppressed if no
  // token is left.
  int32_t* sampled = nullptr;
};
inline constexpr int32_t kNotFinite = -1;
inline constexpr int32_t kAllSuppressed = -2;

// 0 where shared memory is enough: then `workspace` may be nullptr.
// A row's logits are kept in the shared memory of a cluster of thread blocks.
inline constexpr int kMaxVocabSize = 380000;

size_t SamplerWorkspaceBytes(int max_rows, int vocab_size);

// Draws as engine/cpu's Sampler does: the same order of limits, the same weights in f64, the same
// number of UniformDraw(), the lowest id among equals.
cudaError_t SampleTokens(const SampleArgs& args, cudaStream_t stream);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_KERNELS_SAMPLER_H_
