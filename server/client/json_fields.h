#ifndef LATENTD_SERVER_CLIENT_JSON_FIELDS_H_
#define LATENTD_SERVER_CLIENT_JSON_FIELDS_H_

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"

namespace latentd {

// Takes a JSON object apart, field by field, and notes what is wrong with it: each error is
// "PATH: what", such as "body.top_p: is a string; must be a number". A field that is null counts as
// not there.
class JsonFields {
 public:
  using Json = nlohmann::ordered_json;  // schemas are text that the model reads: their order counts

  // `json` and `errors` must outlive the object. Where `json` is no object that is an error, and it
  // has no fields. `path`: what errors call it; empty: the root.
  JsonFields(const Json& json, std::string path, std::vector<std::string>* errors);

  // The field, which is then known; nullptr when it is not there.
  const Json* Take(absl::string_view name);
  // The same, of a type; nullopt also where it is of another, which is an error.
  std::optional<std::string> String(absl::string_view name);
  std::optional<bool> Bool(absl::string_view name);
  std::optional<double> Number(absl::string_view name);
  // In [low, high].
  std::optional<int64_t> Integer(absl::string_view name, int64_t low, int64_t high);
  std::optional<int32_t> Int32(absl::string_view name);
  // A list or an object; nullptr also where it is something else, which is an error.
  const Json* List(absl::string_view name);
  const Json* Object(absl::string_view name);

  void Error(absl::string_view name, absl::string_view what);
  // "body.messages" of the field `messages` of `body`.
  std::string PathOf(absl::string_view name) const;
  std::vector<std::string>* errors() const { return errors_; }

  // Every field that was not taken is an error. Call it last.
  void RefuseOthers();

 private:
  // The field, if it is there and `matches` (a member of Json); else an error that names `must`.
  const Json* TakeAs(absl::string_view name, bool (Json::*matches)() const noexcept,
                     absl::string_view must);

  const Json& json_;
  const std::string path_;
  std::vector<std::string>* const errors_;
  std::vector<absl::string_view> taken_;
};

// "a string", as an error calls it.
absl::string_view JsonTypeName(const JsonFields::Json& json);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_JSON_FIELDS_H_
