#ifndef LATENTD_TESTS_ENGINE_CUDA_WEIGHTS_REFERENCE_H_
#define LATENTD_TESTS_ENGINE_CUDA_WEIGHTS_REFERENCE_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "engine/cuda/gpu_weights.h"
#include "engine/model/config.h"
#include "engine/model/weights.h"

namespace latentd {

// The bytes of GpuWeights by name ("layers.3.mlp.gate_up.scales"), without the RoPE tables.
using WeightBytes = std::map<std::string, std::vector<std::byte>>;

// What gpu_weights.h says they are, element by element from the stored tensors. Slow.
WeightBytes ExpectedWeights(const ModelConfig& config, const ModelWeights& stored);

// What they are: `read` copies from the memory that they lie in.
using ReadMemory = std::function<void(const void* from, size_t size, std::byte* to)>;
WeightBytes ActualWeights(const ModelConfig& config, const GpuWeights& gpu, const ReadMemory& read);

// Reports the names and elements that differ.
void ExpectEqualWeights(const WeightBytes& actual, const WeightBytes& expected);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_CUDA_WEIGHTS_REFERENCE_H_
