#ifndef LATENTD_SERVER_CHECK_H_
#define LATENTD_SERVER_CHECK_H_

#include <cstdint>
#include <iosfwd>

#include "absl/status/status.h"
#include "server/config.h"
#include "server/model_loader.h"

namespace latentd {

// `latentd check`: what serving would refuse is refused, with the same words, and nothing is
// loaded. Writes the model, the memory plan and what was checked to `out`. Where the model is a
// lone config.json its tokenizer and weights are not asked for. Of a group, the memory of a rank,
// and the KV cache of all.
// `gpu_memory_bytes`: what the GPU that it is planned for has free, for the CUDA engine.
absl::Status RunCheck(const ServeConfig& config, const ModelPath& path, uint64_t gpu_memory_bytes,
                      std::ostream& out);

}  // namespace latentd

#endif  // LATENTD_SERVER_CHECK_H_
