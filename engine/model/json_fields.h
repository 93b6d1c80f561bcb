#ifndef LATENTD_ENGINE_MODEL_JSON_FIELDS_H_
#define LATENTD_ENGINE_MODEL_JSON_FIELDS_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"

namespace latentd {

// Reads the fields of one JSON object and keeps the first error: a wrong type or a value outside
// its range. After an error the readers do nothing, so that a parser can read a whole object and
// ask once. A field that is absent leaves its variable as it is.
class JsonFields {
 public:
  // Errors begin with `file` ("config.json") and `path`, the way to the object ("" or
  // "rope_scaling."). `object` must outlive this.
  JsonFields(const nlohmann::json& object, std::string file, std::string path = "")
      : object_(object), file_(std::move(file)), path_(std::move(path)) {}

  void Int(std::string_view name, int64_t min, int64_t max, int32_t* value);
  void Float(std::string_view name, double min, double max, float* value);  // both ends allowed
  void Bool(std::string_view name, bool* value);
  void String(std::string_view name, std::string* value);

  // JSON null is absent.
  void OptionalInt(std::string_view name, int64_t min, int64_t max, std::optional<int32_t>* value);
  void OptionalFloat(std::string_view name, double min, double max, std::optional<float>* value);
  void OptionalBool(std::string_view name, std::optional<bool>* value);
  // One integer, or a list of them.
  void Ints(std::string_view name, int64_t min, int64_t max, std::vector<int32_t>* values);

  // The value itself; nullptr when it is absent or null.
  const nlohmann::json* Find(std::string_view name);
  // Only `supported` (JSON text), absent and null will do.
  void Only(std::string_view name, const nlohmann::json& supported);
  void Ignore(std::string_view name) { known_.emplace(name); }

  // "field: is 3; must be ...": an error of the caller's own.
  void Refuse(std::string_view name, std::string_view supported);

  const absl::Status& status() const { return status_; }
  std::vector<std::string> UnknownFields() const;  // those that nobody asked for

 private:
  const nlohmann::json* Get(std::string_view name);  // nullptr: absent, or after an error

  const nlohmann::json& object_;
  std::string file_;
  std::string path_;
  std::set<std::string, std::less<>> known_;
  absl::Status status_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_MODEL_JSON_FIELDS_H_
