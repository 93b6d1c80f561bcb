#ifndef LATENTD_SERVER_FINGERPRINT_H_
#define LATENTD_SERVER_FINGERPRINT_H_

#include <string>

#include "absl/status/statusor.h"
#include "server/config.h"
#include "server/model_loader.h"

namespace latentd {

// What the processes of a group compare, so that none computes another model, or in another way,
// than the rest. SHA-256, hexadecimal.

// Of the config keys that all processes of a group must share (ConfigKey::shared) and of the
// model's config.json, byte for byte. Paths, addresses and what concerns one process do not count:
// nodes may keep the model in different places.
absl::StatusOr<std::string> ConfigHash(const ServeConfig& config, const ModelPath& model);

// Of the checkpoint: every tensor's name, type and shape, and a few bytes of some of them, so that
// another training of the same model is told apart. However they lie in files. Reads the headers
// and less than a megabyte beside. Empty where load_format is dummy.
absl::StatusOr<std::string> CheckpointHash(const ServeConfig& config, const ModelPath& model);

}  // namespace latentd

#endif  // LATENTD_SERVER_FINGERPRINT_H_
