#include "server/fingerprint.h"

#include <algorithm>
#include <cstddef>
#include <memory>
#include <string_view>

#include "engine/model/json.h"
#include "engine/model/safetensors.h"
#include "engine/status.h"
#include "fmt/format.h"
#include "server/sha256.h"

namespace latentd {
namespace {

constexpr size_t kMaxConfigBytes = size_t{16} << 20;
constexpr size_t kSampledTensors = 128;  // each may cost a seek or two of a network file system
constexpr size_t kSampledBytes = 64;     // at each end of a tensor

}  // namespace

absl::StatusOr<std::string> ConfigHash(const ServeConfig& config, const ModelPath& model) {
  ASSIGN_OR_RETURN(const std::string json, ReadTextFile(model.config_file, kMaxConfigBytes));
  Sha256 hash;
  for (const ConfigKey& key : ConfigKeys()) {
    if (key.shared) hash.Add(fmt::format("{} = {}\n", key.name, ConfigValue(key, config)));
  }
  hash.Add(json);
  return HexOf(hash.Finish());
}

absl::StatusOr<std::string> CheckpointHash(const ServeConfig& config, const ModelPath& model) {
  if (config.load_format == "dummy") return std::string();
  ASSIGN_OR_RETURN(const std::unique_ptr<Checkpoint> checkpoint, Checkpoint::Open(model.dir));
  Sha256 hash;
  const size_t stride = std::max<size_t>(1, checkpoint->tensors().size() / kSampledTensors);
  size_t index = 0;
  std::string sample(kSampledBytes, '\0');
  for (const auto& [name, tensor] : checkpoint->tensors()) {  // in the order of their names
    hash.Add(fmt::format("{} {} {}\n", name, DTypeName(tensor.dtype), tensor.ShapeString()));
    if (index++ % stride != 0) continue;
    const size_t bytes = tensor.num_bytes();
    const size_t edge = std::min(bytes, kSampledBytes);
    for (const std::byte* begin : {tensor.data, tensor.data + (bytes - edge)}) {
      RETURN_IF_ERROR(checkpoint->Read(begin, edge, reinterpret_cast<std::byte*>(sample.data())));
      hash.Add(std::string_view(sample).substr(0, edge));
    }
  }
  return HexOf(hash.Finish());
}

}  // namespace latentd
