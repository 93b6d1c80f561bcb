#include "engine/model/json_fields.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "engine/model/json.h"

namespace latentd {
namespace {

bool IsIntIn(const nlohmann::json& value, int64_t min, int64_t max) {
  if (!value.is_number_integer()) return false;
  // A value above INT64_MAX is stored unsigned and would wrap.
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) {
    return false;
  }
  const auto number = value.get<int64_t>();
  return number >= min && number <= max;
}

std::string IntRange(int64_t min, int64_t max) {
  return absl::StrCat("an integer in [", min, ", ", max, "]");
}

}  // namespace

const nlohmann::json* JsonFields::Get(std::string_view name) {
  known_.emplace(name);
  if (!status_.ok()) return nullptr;
  const auto it = object_.find(std::string(name));
  return it == object_.end() ? nullptr : &*it;
}

const nlohmann::json* JsonFields::Find(std::string_view name) {
  const nlohmann::json* value = Get(name);
  return value == nullptr || value->is_null() ? nullptr : value;
}

void JsonFields::Refuse(std::string_view name, std::string_view supported) {
  if (!status_.ok()) return;
  const auto it = object_.find(std::string(name));
  const std::string shown = it == object_.end() ? "absent" : Shown(*it);
  status_ = absl::InvalidArgumentError(absl::StrCat(file_, ": ", path_, ShownName(name), " is ",
                                                    shown, "; must be ", std::string(supported)));
}

void JsonFields::Int(std::string_view name, int64_t min, int64_t max, int32_t* value) {
  const nlohmann::json* json = Get(name);
  if (json == nullptr) return;
  if (!IsIntIn(*json, min, max)) return Refuse(name, IntRange(min, max));
  *value = json->get<int32_t>();
}

void JsonFields::Float(std::string_view name, double min, double max, float* value) {
  const nlohmann::json* json = Get(name);
  if (json == nullptr) return;
  if (!json->is_number() || !(json->get<double>() >= min && json->get<double>() <= max)) {
    return Refuse(name, absl::StrCat("a number in [", min, ", ", max, "]"));
  }
  *value = static_cast<float>(json->get<double>());
}

void JsonFields::Bool(std::string_view name, bool* value) {
  const nlohmann::json* json = Get(name);
  if (json == nullptr) return;
  if (!json->is_boolean()) return Refuse(name, "true or false");
  *value = json->get<bool>();
}

void JsonFields::String(std::string_view name, std::string* value) {
  const nlohmann::json* json = Get(name);
  if (json == nullptr) return;
  if (!json->is_string()) return Refuse(name, "a string");
  *value = json->get<std::string>();
}

void JsonFields::OptionalInt(std::string_view name, int64_t min, int64_t max,
                             std::optional<int32_t>* value) {
  const nlohmann::json* json = Get(name);
  if (json == nullptr) return;
  value->reset();
  if (json->is_null()) return;
  if (!IsIntIn(*json, min, max)) return Refuse(name, IntRange(min, max) + " or null");
  *value = json->get<int32_t>();
}

void JsonFields::OptionalFloat(std::string_view name, double min, double max,
                               std::optional<float>* value) {
  if (Find(name) == nullptr) return;
  float number = 0;
  Float(name, min, max, &number);
  if (status_.ok()) *value = number;
}

void JsonFields::OptionalBool(std::string_view name, std::optional<bool>* value) {
  if (Find(name) == nullptr) return;
  bool flag = false;
  Bool(name, &flag);
  if (status_.ok()) *value = flag;
}

void JsonFields::Ints(std::string_view name, int64_t min, int64_t max,
                      std::vector<int32_t>* values) {
  const nlohmann::json* json = Get(name);
  if (json == nullptr) return;
  values->clear();
  if (json->is_null()) return;
  if (json->is_array() && json->size() <= 1024) {
    for (const nlohmann::json& item : *json) {
      if (!IsIntIn(item, min, max)) return Refuse(name, IntRange(min, max) + " or a list of them");
      values->push_back(item.get<int32_t>());
    }
    return;
  }
  if (!IsIntIn(*json, min, max)) return Refuse(name, IntRange(min, max) + " or a list of them");
  values->push_back(json->get<int32_t>());
}

void JsonFields::Only(std::string_view name, const nlohmann::json& supported) {
  const nlohmann::json* json = Find(name);
  if (json != nullptr && *json != supported) Refuse(name, Shown(supported));
}

std::vector<std::string> JsonFields::UnknownFields() const {
  std::vector<std::string> unknown;
  for (const auto& [name, value] : object_.items()) {
    if (known_.find(name) == known_.end()) unknown.push_back(absl::StrCat(path_, ShownName(name)));
  }
  return unknown;
}

}  // namespace latentd
