#ifndef LATENTD_ENGINE_CUDA_FORWARD_H_
#define LATENTD_ENGINE_CUDA_FORWARD_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "absl/status/status.h"
#include "engine/cuda/cublas.h"
#include "engine/cuda/gpu_weights.h"
#include "engine/cuda/group_experts.h"
#include "engine/cuda/kernel_timer.h"
#include "engine/cuda/mla_prefill.h"
#include "engine/cuda/step_buffers.h"
#include "engine/cuda/step_input.h"
#include "engine/cuda/step_trace.h"
#include "engine/model/config.h"

namespace latentd {

// Enqueues the kernels of a step: embeddings, layers, logits, the draw. Nothing is computed on the
// host and nothing waited for, so a step without long chunks can be captured.
class CudaForward {
 public:
  // All must outlive it.
  struct Parts {
    const ModelConfig* config = nullptr;
    const GpuWeights* weights = nullptr;
    const StepBuffers* buffers = nullptr;
    MlaCache cache;  // of the first layer; the others follow
    int32_t num_blocks = 0;
    Cublas* cublas = nullptr;
    MlaPrefill* prefill = nullptr;
    bool batch_invariant = false;
    GroupExperts::Group group;  // without an exchange: the model is alone
  };
  explicit CudaForward(const Parts& parts);

  // Whoever looks on; both may be nullptr.
  struct Watch {
    StepTrace* trace = nullptr;
    KernelTimer* timer = nullptr;
  };

  // Layers [begin, end) of a step: the embeddings belong to the first, logits and draw to the last.
  // A step's kernels can so be enqueued in several parts.
  struct Layers {
    int begin = 0;
    int end = 0;
  };
  Layers all_layers() const { return {0, parts_.config->num_hidden_layers}; }

  // `input` lies on the device. sampled [shape.samples()] out: as SampleArgs says, in memory that
  // the device can write. A shape with more rows than absorbed ones: MlaPrefill::Plan() was called.
  absl::Status Run(const StepShape& shape, const StepArrays& input, const Layers& layers,
                   int32_t* sampled, const Watch& watch, cudaStream_t stream) const;

 private:
  Parts parts_;
  float softmax_scale_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_FORWARD_H_
