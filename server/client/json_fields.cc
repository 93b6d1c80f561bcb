#include "server/client/json_fields.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace latentd {

absl::string_view JsonTypeName(const JsonFields::Json& json) {
  switch (json.type()) {
    case JsonFields::Json::value_t::null:
      return "null";
    case JsonFields::Json::value_t::object:
      return "an object";
    case JsonFields::Json::value_t::array:
      return "a list";
    case JsonFields::Json::value_t::string:
      return "a string";
    case JsonFields::Json::value_t::boolean:
      return "a boolean";
    default:
      return "a number";
  }
}

JsonFields::JsonFields(const Json& json, std::string path, std::vector<std::string>* errors)
    : json_(json), path_(std::move(path)), errors_(errors) {
  if (json_.is_object()) return;
  errors_->push_back(absl::StrCat(path_.empty() ? "the line" : path_, ": is ", JsonTypeName(json_),
                                  "; must be an object"));
}

const JsonFields::Json* JsonFields::Take(absl::string_view name) {
  if (!json_.is_object()) return nullptr;
  const auto it = json_.find(std::string(name));
  if (it == json_.end()) return nullptr;
  taken_.push_back(name);
  return it->is_null() ? nullptr : &*it;
}

const JsonFields::Json* JsonFields::TakeAs(absl::string_view name,
                                           bool (Json::*matches)() const noexcept,
                                           absl::string_view must) {
  const Json* field = Take(name);
  if (field == nullptr || (field->*matches)()) return field;
  Error(name, absl::StrCat("is ", JsonTypeName(*field), "; must be ", must));
  return nullptr;
}

std::optional<std::string> JsonFields::String(absl::string_view name) {
  const Json* field = TakeAs(name, &Json::is_string, "a string");
  return field == nullptr ? std::nullopt : std::optional(field->get<std::string>());
}

std::optional<bool> JsonFields::Bool(absl::string_view name) {
  const Json* field = TakeAs(name, &Json::is_boolean, "true or false");
  return field == nullptr ? std::nullopt : std::optional(field->get<bool>());
}

std::optional<double> JsonFields::Number(absl::string_view name) {
  const Json* field = TakeAs(name, &Json::is_number, "a number");
  return field == nullptr ? std::nullopt : std::optional(field->get<double>());
}

std::optional<int64_t> JsonFields::Integer(absl::string_view name, int64_t low, int64_t high) {
  const Json* field = TakeAs(name, &Json::is_number_integer, "an integer");
  if (field == nullptr) return std::nullopt;
  const bool too_large = field->is_number_unsigned() &&
                         field->get<uint64_t>() > static_cast<uint64_t>(std::max<int64_t>(high, 0));
  if (const auto value = field->get<int64_t>(); !too_large && value >= low && value <= high) {
    return value;
  }
  Error(name, absl::StrCat("is ", field->dump(), "; must be in [", low, ", ", high, "]"));
  return std::nullopt;
}

std::optional<int32_t> JsonFields::Int32(absl::string_view name) {
  const auto value =
      Integer(name, std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max());
  return value ? std::optional(static_cast<int32_t>(*value)) : std::nullopt;
}

const JsonFields::Json* JsonFields::List(absl::string_view name) {
  return TakeAs(name, &Json::is_array, "a list");
}

const JsonFields::Json* JsonFields::Object(absl::string_view name) {
  return TakeAs(name, &Json::is_object, "an object");
}

void JsonFields::Error(absl::string_view name, absl::string_view what) {
  // Of what is no object that has been said, and its fields are missing for no other reason.
  if (json_.is_object()) errors_->push_back(absl::StrCat(PathOf(name), ": ", what));
}

std::string JsonFields::PathOf(absl::string_view name) const {
  return path_.empty() ? std::string(name) : absl::StrCat(path_, ".", name);
}

void JsonFields::RefuseOthers() {
  if (!json_.is_object()) return;
  for (const auto& [name, value] : json_.items()) {
    if (value.is_null() || std::find(taken_.begin(), taken_.end(), name) != taken_.end()) continue;
    Error(name, "is no field that is served");
  }
}

}  // namespace latentd
