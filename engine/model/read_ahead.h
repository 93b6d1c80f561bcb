#ifndef LATENTD_ENGINE_MODEL_READ_AHEAD_H_
#define LATENTD_ENGINE_MODEL_READ_AHEAD_H_

#include <functional>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "engine/model/safetensors.h"
#include "engine/model/weights.h"

namespace latentd {

// Brings the tensors of these names from their files into memory, several threads at once; names
// that the checkpoint does not have are left out. DATA_LOSS names a tensor that cannot be read: its
// file was shortened after Open(), or its disk fails.
absl::Status ReadAhead(const Checkpoint& checkpoint,
                       const std::set<std::string, std::less<>>& names,
                       const LoadProgress& progress);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_READ_AHEAD_H_
