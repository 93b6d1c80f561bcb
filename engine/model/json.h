#ifndef LATENTD_ENGINE_MODEL_JSON_H_
#define LATENTD_ENGINE_MODEL_JSON_H_

#include <cstddef>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace latentd {

// Parses a JSON object of a file that nobody vouched for. INVALID_ARGUMENT, beginning with `what`,
// for a syntax error, anything but an object, nesting deeper than 32, or a key that occurs twice in
// one object: the field that is read would depend on the parser. Throws nothing.
absl::StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, std::string_view what);

// The whole file. NOT_FOUND if there is none; INVALID_ARGUMENT when it is larger than `max_bytes`
// or not a regular file.
absl::StatusOr<std::string> ReadTextFile(const std::filesystem::path& file, size_t max_bytes);

// How a value is shown in an error: its JSON, cut to a line.
std::string Shown(const nlohmann::json& value);

// The same for a name that a file gave us: cut, and with everything unprintable replaced.
std::string ShownName(std::string_view name);

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_JSON_H_
