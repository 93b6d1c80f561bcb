#include "server/client/batch_input.h"

#include <google/protobuf/util/json_util.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "latentd/v1/batch.pb.h"
#include "server/batch/item_chain.h"
#include "server/client/batch_client.h"
#include "server/client/json_fields.h"
#include "server/client/line_reader.h"
#include "server/client/openai_batch.h"

namespace latentd {
namespace {

using Json = JsonFields::Json;

constexpr size_t kReadBytes = 1 << 18;
// Far more than a server takes as an item; a file that has no lines at all ends here.
constexpr size_t kMaxLineBytes = 256 << 20;
constexpr char kByteOrderMark[] = "\xef\xbb\xbf";

// Takes nothing from the JSON but the place and the words of its first syntax error.
struct SyntaxCheck : nlohmann::json_sax<Json> {
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return true; }
  bool key(string_t&) override { return true; }
  bool end_object() override { return true; }
  bool start_array(size_t) override { return true; }
  bool end_array() override { return true; }
  bool parse_error(size_t position, const std::string&, const Json::exception& error) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 3: what"
    const std::string text = error.what();
    const size_t colon = text.find(": ");
    what = absl::StrCat("is no JSON (byte ", position,
                        "): ", colon == std::string::npos ? text : text.substr(colon + 2));
    return false;
  }

  std::string what;
};

// 16 bytes of the SHA-256: no two custom_ids of a file meet by chance.
std::array<char, 16> KeyOf(const std::string& custom_id) {
  std::array<char, 16> key;
  std::memcpy(key.data(), Sha256::Of(custom_id).data(), key.size());
  return key;
}

}  // namespace

absl::StatusOr<std::unique_ptr<BatchInput>> BatchInput::Open(Options options, int in_fd,
                                                             const Interrupts& interrupts) {
  const bool is_stdin = options.path == "-";
  File file(is_stdin ? std::tmpfile() : std::fopen(options.path.c_str(), "rbe"), std::fclose);
  if (file == nullptr) {
    return absl::NotFoundError(absl::StrCat(
        "cannot open ", is_stdin ? "a temporary file" : options.path, ": ", std::strerror(errno)));
  }
  if (is_stdin) {
    options.path = "<stdin>";
    RETURN_IF_ERROR(CopyAll(in_fd, file.get(), interrupts));
    std::rewind(file.get());
  }
  return std::unique_ptr<BatchInput>(new BatchInput(std::move(options), std::move(file)));
}

absl::StatusOr<BatchInput::Summary> BatchInput::Check(const Interrupts& interrupts) {
  Rewind();
  Summary summary;
  ItemChain chain;
  absl::flat_hash_map<std::array<char, 16>, int64_t> lines;  // of the custom_ids
  while (true) {
    if (interrupts.pending()) return absl::CancelledError("interrupted");
    ASSIGN_OR_RETURN(const std::optional<std::string> line, NextLine());
    if (!line) break;
    const size_t before = summary.errors.size();
    std::string custom_id;
    const std::string item = ReadItem(*line, &custom_id, &summary.errors);
    if (!custom_id.empty()) {
      const auto [it, is_new] = lines.emplace(KeyOf(custom_id), line_);
      if (!is_new) {
        summary.errors.push_back(
            absl::StrCat("custom_id: '", custom_id, "' is that of line ", it->second, " too"));
      }
    }
    for (size_t i = before; i < summary.errors.size(); ++i) {
      summary.errors[i] = absl::StrCat(Place(), ": ", summary.errors[i]);
    }
    if (summary.errors.size() > static_cast<size_t>(options_.max_errors)) {
      summary.errors.resize(options_.max_errors);
      summary.errors.push_back(absl::StrCat(Place(), ": more is wrong; the rest was not read"));
      break;
    }
    if (!summary.errors.empty()) continue;
    ++summary.num_items;
    summary.num_bytes += static_cast<int64_t>(item.size());
    chain.Add(item);
  }
  if (summary.num_items == 0 && summary.errors.empty()) {
    summary.errors.push_back(absl::StrCat(options_.path, ": has no items"));
  }
  summary.chain = chain.value();
  return summary;
}

void BatchInput::Rewind() {
  std::rewind(file_.get());
  line_ = 0;
  buffer_.clear();
  begin_ = 0;
}

absl::StatusOr<std::optional<std::string>> BatchInput::Next() {
  ASSIGN_OR_RETURN(const std::optional<std::string> line, NextLine());
  if (!line) return std::nullopt;
  std::vector<std::string> errors;
  std::string custom_id;
  std::string item = ReadItem(*line, &custom_id, &errors);
  if (errors.empty()) return item;
  return absl::AbortedError(absl::StrCat(Place(), ": was changed meanwhile: ", errors[0]));
}

std::vector<std::string> BatchInput::PlacesOf(const std::set<int64_t>& items) {
  Rewind();
  std::vector<std::string> places;
  int64_t index = 0;
  for (const int64_t wanted : items) {
    for (; index <= wanted; ++index) {
      const auto line = NextLine();
      if (!line.ok() || !*line) return places;
    }
    places.push_back(Place());
  }
  return places;
}

absl::StatusOr<std::optional<std::string>> BatchInput::NextLine() {
  size_t searched = begin_;
  while (true) {
    size_t end = buffer_.find('\n', searched);
    const bool at_end = end == std::string::npos && std::feof(file_.get()) != 0;
    if (at_end) end = buffer_.size();
    if (end != std::string::npos) {
      if (at_end && begin_ >= buffer_.size()) return std::nullopt;
      std::string line = buffer_.substr(begin_, end - begin_);
      begin_ = end + 1;
      ++line_;
      if (line_ == 1 && line.starts_with(kByteOrderMark)) line.erase(0, 3);
      if (!absl::StripAsciiWhitespace(line).empty()) return line;
      searched = begin_;
      continue;
    }
    buffer_.erase(0, begin_);
    begin_ = 0;
    searched = buffer_.size();
    if (searched > kMaxLineBytes) {
      return absl::InvalidArgumentError(
          absl::StrCat(options_.path, ":", line_ + 1, ": has more than ", kMaxLineBytes, " bytes"));
    }
    buffer_.resize(searched + kReadBytes);
    const size_t size = std::fread(buffer_.data() + searched, 1, kReadBytes, file_.get());
    buffer_.resize(searched + size);
    if (std::ferror(file_.get()) != 0) {
      return absl::DataLossError(
          absl::StrCat("cannot read ", options_.path, ": ", std::strerror(errno)));
    }
  }
}

std::string BatchInput::ReadItem(const std::string& line, std::string* custom_id,
                                 std::vector<std::string>* errors) const {
  const Json json = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (json.is_discarded()) {
    SyntaxCheck check;
    Json::sax_parse(line, &check);
    errors->push_back(check.what);
    return "";
  }
  v1::BatchItem item;
  const bool is_proto = json.is_object() && (json.contains("chat") || json.contains("complete"));
  if (is_proto && !options_.openai_only) {
    const auto parsed = google::protobuf::util::JsonStringToMessage(line, &item);
    if (!parsed.ok()) errors->push_back(absl::StrCat("is no BatchItem: ", parsed.ToString()));
  } else {
    ReadOpenAiItem(json, errors, &item);
  }
  *custom_id = item.custom_id();
  return SerializeDeterministic(item);
}

std::string BatchInput::Place() const { return absl::StrCat(options_.path, ":", line_); }

}  // namespace latentd
