#include "server/text/chat_template.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "server/text/rust_ffi.h"
#include "server/text/tokenizer_impl.h"

namespace latentd {
namespace {

using Json = nlohmann::ordered_json;

// Writing JSON recurses, as does the reader on the other side (which stops at 128).
constexpr int kMaxDepth = 64;

size_t LocalTime(const uint8_t* format, size_t size, uint8_t* out, size_t capacity) {
  const std::string text(reinterpret_cast<const char*>(format), size);
  const std::string time = absl::FormatTime(text, absl::Now(), absl::LocalTimeZone());
  const size_t length = std::min(time.size(), capacity);
  std::memcpy(out, time.data(), length);
  return length;
}

// How deeply arrays and objects nest, up to one beyond kMaxDepth; without recursion.
int Depth(const Json& value) {
  std::vector<std::pair<const Json*, int>> open = {{&value, 0}};
  int depth = 0;
  while (!open.empty() && depth <= kMaxDepth) {
    const auto [node, level] = open.back();
    open.pop_back();
    depth = std::max(depth, level);
    if (!node->is_structured()) continue;
    for (const Json& child : *node) open.emplace_back(&child, level + 1);
  }
  return depth;
}

absl::Status CheckInput(const ChatInput& input) {
  if (!input.messages.is_array()) return absl::InvalidArgumentError("messages: not an array");
  if (!input.tools.is_null() && !input.tools.is_array()) {
    return absl::InvalidArgumentError("tools: not an array");
  }
  if (!input.kwargs.is_null() && !input.kwargs.is_object()) {
    return absl::InvalidArgumentError("kwargs: not an object");
  }
  if (input.add_generation_prompt && input.continue_final_message) {
    return absl::InvalidArgumentError(
        "continue_final_message and add_generation_prompt exclude one another");
  }
  const std::pair<const char*, const Json*> parts[] = {
      {"messages", &input.messages}, {"tools", &input.tools}, {"kwargs", &input.kwargs}};
  for (const auto& [name, value] : parts) {
    if (Depth(*value) > kMaxDepth) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": nests more than ", kMaxDepth, " levels deep"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

struct ChatTemplate::Impl {
  ~Impl() { latentd_template_free(handle); }

  LatentdTemplate* handle = nullptr;
  std::shared_ptr<const Tokenizer> tokenizer;
};

ChatTemplate::ChatTemplate(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
ChatTemplate::~ChatTemplate() = default;

absl::StatusOr<std::shared_ptr<const ChatTemplate>> ChatTemplate::Compile(
    std::string_view source, std::shared_ptr<const Tokenizer> tokenizer) {
  auto impl = std::make_unique<Impl>();
  rust::Bytes error;
  const int code = latentd_template_new(rust::Data(source), source.size(), &LocalTime,
                                        &impl->handle, error.out());
  if (absl::Status s = rust::ToStatus(code, "chat template", error); !s.ok()) return s;
  impl->tokenizer = std::move(tokenizer);
  return std::shared_ptr<const ChatTemplate>(new ChatTemplate(std::move(impl)));
}

absl::StatusOr<RenderedChat> ChatTemplate::Render(const ChatInput& input) const {
  if (absl::Status s = CheckInput(input); !s.ok()) return s;
  const Tokenizer::Impl& tokenizer = *impl_->tokenizer->impl_;
  const Json chat = {{"messages", input.messages},
                     {"tools", input.tools},
                     {"kwargs", input.kwargs},
                     {"special_tokens", tokenizer.special_tokens},
                     {"add_generation_prompt", input.add_generation_prompt},
                     {"continue_final_message", input.continue_final_message},
                     {"parse_control_tokens", input.parse_control_tokens}};
  std::string json;
  try {
    json = chat.dump();
  } catch (const nlohmann::json::exception& e) {  // a string that is not UTF-8
    return absl::InvalidArgumentError(absl::StrCat("chat: ", e.what()));
  }
  rust::Bytes text;
  rust::Ids ids;
  rust::Bytes error;
  const int code = latentd_template_render(impl_->handle, tokenizer.handle, rust::Data(json),
                                           json.size(), text.out(), ids.out(), error.out());
  if (absl::Status s = rust::ToStatus(code, "chat template", error); !s.ok()) return s;
  return RenderedChat{text.str(), ids.vector()};
}

}  // namespace latentd
