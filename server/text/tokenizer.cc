#include "server/text/tokenizer.h"

#include <fstream>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"
#include "server/text/rust_ffi.h"
#include "server/text/tokenizer_impl.h"
#include "server/text/utf8.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int64_t kMaxFileBytes = int64_t{256} << 20;
constexpr int64_t kMaxTemplateBytes = int64_t{1} << 20;
constexpr uint8_t kSpecial = 1;  // bits of LatentdTables::flags
constexpr uint8_t kAdded = 2;

// The whole of a regular file.
absl::StatusOr<std::string> ReadFile(const fs::path& path, int64_t max_bytes) {
  std::error_code error;
  const auto size = fs::is_regular_file(path, error) ? fs::file_size(path, error) : 0;
  std::ifstream file(path, std::ios::binary);
  if (error || !file || !fs::is_regular_file(path, error)) {
    return absl::NotFoundError(absl::StrCat(path.string(), ": no such file, or not readable"));
  }
  if (size > static_cast<uintmax_t>(max_bytes)) {
    return absl::InvalidArgumentError(
        absl::StrCat(path.string(), ": has ", size, " bytes; the limit is ", max_bytes));
  }
  std::string text(size, '\0');
  file.read(text.data(), static_cast<std::streamsize>(size));
  text.resize(static_cast<size_t>(file.gcount()));
  return text;
}

// A token is written as its text or as an object with `content`.
std::string TokenText(const Json& token) {
  if (token.is_string()) return token.get<std::string>();
  if (token.is_object() && token.contains("content") && token["content"].is_string()) {
    return token["content"].get<std::string>();
  }
  return "";
}

// `chat_template` is a string, or a list of {name, template} of which "default" is meant.
std::string TemplateText(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return "";
  for (const Json& entry : value) {
    if (entry.is_object() && entry.value("name", Json()) == "default" &&
        entry.value("template", Json()).is_string()) {
      return entry["template"].get<std::string>();
    }
  }
  return "";
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::shared_ptr<const Tokenizer>> Tokenizer::Load(const fs::path& dir) {
  auto impl = std::make_unique<Impl>();
  const fs::path path = dir / "tokenizer.json";
  const absl::StatusOr<std::string> text = ReadFile(path, kMaxFileBytes);
  if (!text.ok()) return text.status();
  rust::Bytes error;
  const int code =
      latentd_tokenizer_new(rust::Data(*text), text->size(), &impl->handle, error.out());
  if (absl::Status s = rust::ToStatus(code, path.string(), error); !s.ok()) return s;
  impl->tables = latentd_tokenizer_tables(impl->handle);

  const fs::path config_path = dir / "tokenizer_config.json";
  impl->special_tokens = Json::object();
  std::error_code ignored;
  if (fs::exists(config_path, ignored)) {
    const absl::StatusOr<std::string> config_text = ReadFile(config_path, kMaxFileBytes);
    if (!config_text.ok()) return config_text.status();
    const Json config = Json::parse(*config_text, nullptr, /*allow_exceptions=*/false);
    if (!config.is_object()) {
      return absl::InvalidArgumentError(absl::StrCat(config_path.string(), ": not a JSON object"));
    }
    for (const char* name : {"bos_token", "eos_token", "unk_token", "pad_token"}) {
      const std::string token = config.contains(name) ? TokenText(config[name]) : "";
      if (!token.empty()) impl->special_tokens[name] = token;
    }
    if (config.contains("chat_template"))
      impl->chat_template = TemplateText(config["chat_template"]);
  }
  impl->bos_token = impl->special_tokens.value("bos_token", "");
  impl->eos_token = impl->special_tokens.value("eos_token", "");

  const fs::path template_path = dir / "chat_template.jinja";
  if (fs::exists(template_path, ignored)) {
    absl::StatusOr<std::string> source = ReadFile(template_path, kMaxTemplateBytes);
    if (!source.ok()) return source.status();
    impl->chat_template = *std::move(source);
  }
  return std::shared_ptr<const Tokenizer>(new Tokenizer(std::move(impl)));
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->tables.num_ids); }

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text,
                                                       bool parse_control_tokens) const {
  rust::Ids ids;
  rust::Bytes error;
  const int code = latentd_tokenizer_encode(impl_->handle, rust::Data(text), text.size(),
                                            parse_control_tokens, ids.out(), error.out());
  if (absl::Status s = rust::ToStatus(code, "encode", error); !s.ok()) return s;
  return ids.vector();
}

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, bool skip_special_tokens) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!skip_special_tokens || !IsSpecial(id)) bytes += TokenBytes(id);
  }
  std::string text;
  text.reserve(bytes.size());
  TakeUtf8(bytes, /*at_end=*/true, text);
  return text;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  const LatentdTables& t = impl_->tables;
  if (id < 0 || static_cast<size_t>(id) >= t.num_ids) return {};
  return {reinterpret_cast<const char*>(t.bytes) + t.offsets[id],
          t.offsets[id + 1] - t.offsets[id]};
}

bool Tokenizer::IsSpecial(int32_t id) const {
  return id >= 0 && id < vocab_size() && (impl_->tables.flags[id] & kSpecial) != 0;
}

bool Tokenizer::IsAdded(int32_t id) const {
  return id >= 0 && id < vocab_size() && (impl_->tables.flags[id] & kAdded) != 0;
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view token) const {
  const int64_t id = latentd_tokenizer_token_id(impl_->handle, rust::Data(token), token.size());
  if (id < 0) return std::nullopt;
  return static_cast<int32_t>(id);
}

const std::string& Tokenizer::bos_token() const { return impl_->bos_token; }
const std::string& Tokenizer::eos_token() const { return impl_->eos_token; }
const std::string& Tokenizer::chat_template() const { return impl_->chat_template; }

}  // namespace latentd
