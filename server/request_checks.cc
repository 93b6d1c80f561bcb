#include "server/request_checks.h"

#include <algorithm>
#include <cstdint>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace latentd {
namespace {

constexpr int kMaxTools = 128;
constexpr int kMaxStop = 16;
constexpr size_t kMaxStopBytes = 256;
constexpr int kMaxStopTokenIds = 64;
constexpr int kMaxLogitBias = 1024;
constexpr int kMaxN = 128;
constexpr int kMaxLogprobs = 20;
constexpr int32_t kMaxPriority = 1000;
constexpr size_t kMaxCacheSaltBytes = 256;
constexpr size_t kMaxRequestIdBytes = 128;
constexpr size_t kMaxMetadata = 16;
constexpr size_t kMaxMetadataKeyBytes = 64;
constexpr size_t kMaxMetadataValueBytes = 512;
constexpr size_t kMaxNameBytes = 64;
constexpr size_t kMaxViolations = 64;  // kept; a prompt of bad tokens has as many as tokens

// The interval that a value must lie in.
struct Range {
  double low, high;
  bool low_open = false;

  // False for NaN.
  bool Contains(double value) const {
    return (low_open ? value > low : value >= low) && value <= high;
  }
  std::string ToString() const { return absl::StrCat(low_open ? "(" : "[", low, ", ", high, "]"); }
};

void CheckRange(double value, Range range, std::string field, RequestErrors* errors) {
  if (range.Contains(value)) return;
  errors->Invalid(std::move(field), absl::StrCat("is ", value, "; must be in ", range.ToString()));
}

void CheckAtLeast(int64_t value, int64_t low, std::string field, RequestErrors* errors) {
  if (value < low) {
    errors->Invalid(std::move(field), absl::StrCat("is ", value, "; must be at least ", low));
  }
}

void CheckBytes(const std::string& value, size_t low, size_t high, std::string field,
                RequestErrors* errors) {
  if (value.size() >= low && value.size() <= high) return;
  errors->Invalid(std::move(field),
                  absl::StrCat("has ", value.size(), " bytes; must have ", low, " to ", high));
}

void CheckCount(int64_t count, int64_t high, std::string field, RequestErrors* errors) {
  if (count <= high) return;
  errors->Invalid(std::move(field), absl::StrCat("has ", count, " entries; at most ", high));
}

bool IsName(absl::string_view name) {
  return !name.empty() && name.size() <= kMaxNameBytes &&
         std::all_of(name.begin(), name.end(), [](char c) {
           return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '-' ||
                  c == '.';
         });
}

std::string At(const std::string& prefix, absl::string_view field, int index) {
  return absl::StrCat(prefix, field, "[", index, "]");
}

// Only these roles may have these fields.
void CheckRoleFields(const v1::Message& message, const std::string& path, RequestErrors* errors) {
  const bool is_assistant = message.role() == v1::ROLE_ASSISTANT;
  const bool is_tool = message.role() == v1::ROLE_TOOL;
  if (message.has_reasoning() && !is_assistant) {
    errors->Invalid(absl::StrCat(path, ".reasoning"), "is for the role assistant alone");
  }
  if (message.tool_calls_size() > 0 && !is_assistant) {
    errors->Invalid(absl::StrCat(path, ".tool_calls"), "is for the role assistant alone");
  }
  if (!message.tool_call_id().empty() && !is_tool) {
    errors->Invalid(absl::StrCat(path, ".tool_call_id"), "is for the role tool alone");
  }
  if (!message.name().empty() && !is_tool) {
    errors->Invalid(absl::StrCat(path, ".name"), "is for the role tool alone");
  }
  const bool may_lack_content =
      is_assistant && (message.tool_calls_size() > 0 || message.has_reasoning());
  if (!message.has_content() && !may_lack_content) {
    errors->Invalid(absl::StrCat(path, ".content"), "is not set");
  }
}

}  // namespace

void RequestErrors::Invalid(std::string field, std::string description) {
  if (invalid_.size() < kMaxViolations) {
    invalid_.push_back({std::move(field), std::move(description)});
  }
}

void RequestErrors::Unimplemented(std::string field) {
  unimplemented_.push_back({std::move(field), "is not served by this version"});
}

absl::Status RequestErrors::ToStatus() const {
  if (!invalid_.empty()) return MakeBadRequest(invalid_);
  if (unimplemented_.empty()) return absl::OkStatus();
  const std::string fields = absl::StrJoin(
      unimplemented_, ",",
      [](std::string* out, const FieldViolation& violation) { out->append(violation.field); });
  return WithFieldViolations(
      MakeError(absl::StatusCode::kUnimplemented, "UNIMPLEMENTED_FIELD",
                absl::StrCat("not served by this version: ", fields), {{"fields", fields}}),
      unimplemented_);
}

void CheckMessages(const v1::ChatRequest& chat, const std::string& prefix, RequestErrors* errors) {
  if (chat.messages_size() == 0) {
    errors->Invalid(absl::StrCat(prefix, "messages"), "is empty; must have at least one");
    return;
  }
  for (int i = 0; i < chat.messages_size(); ++i) {
    const v1::Message& message = chat.messages(i);
    const std::string path = At(prefix, "messages", i);
    if (message.role() < v1::ROLE_SYSTEM || message.role() > v1::ROLE_TOOL) {
      errors->Invalid(absl::StrCat(path, ".role"),
                      absl::StrCat("is ", static_cast<int>(message.role()),
                                   "; must be system, user, assistant or tool"));
      continue;
    }
    CheckRoleFields(message, path, errors);
    for (int j = 0; j < message.tool_calls_size(); ++j) {
      if (message.tool_calls(j).name().empty()) {
        errors->Invalid(absl::StrCat(At(path, ".tool_calls", j), ".name"), "is empty");
      }
    }
  }
  const v1::Message& last = chat.messages(chat.messages_size() - 1);
  if (chat.continue_final_message() && (last.role() != v1::ROLE_ASSISTANT || !last.has_content())) {
    errors->Invalid(absl::StrCat(prefix, "continue_final_message"),
                    "needs a last message of the role assistant with content");
  }
}

void CheckTools(const v1::ChatRequest& chat, const std::string& prefix, Purpose purpose,
                RequestErrors* errors) {
  CheckCount(chat.tools_size(), kMaxTools, absl::StrCat(prefix, "tools"), errors);
  for (int i = 0; i < chat.tools_size(); ++i) {
    const v1::Tool& tool = chat.tools(i);
    const std::string path = At(prefix, "tools", i);
    if (!IsName(tool.name())) {
      errors->Invalid(
          absl::StrCat(path, ".name"),
          absl::StrCat("must be 1 to ", kMaxNameBytes, " letters, digits, '_', '-' or '.'"));
    }
    if (!tool.parameters().empty() &&
        !nlohmann::ordered_json::parse(tool.parameters(), nullptr, /*allow_exceptions=*/false)
             .is_object()) {
      errors->Invalid(absl::StrCat(path, ".parameters"), "is not the JSON text of an object");
    }
  }
  const v1::ToolChoice& choice = chat.tool_choice();
  const std::string path = absl::StrCat(prefix, "tool_choice");
  if (choice.has_mode() && (choice.mode() < v1::ToolChoice::MODE_UNSPECIFIED ||
                            choice.mode() > v1::ToolChoice::MODE_REQUIRED)) {
    errors->Invalid(path, absl::StrCat("is ", static_cast<int>(choice.mode()),
                                       "; must be auto, none or required"));
  }
  const bool must_call = choice.has_function() || choice.mode() == v1::ToolChoice::MODE_REQUIRED;
  if (must_call && chat.tools_size() == 0) errors->Invalid(path, "needs tools");
  if (choice.has_function() && chat.tools_size() > 0 &&
      std::none_of(chat.tools().begin(), chat.tools().end(),
                   [&](const v1::Tool& tool) { return tool.name() == choice.function(); })) {
    errors->Invalid(absl::StrCat(path, ".function"), "names none of the tools");
  }
  if (purpose == Purpose::kRender) return;
  if (chat.tools_size() > 0) errors->Unimplemented(absl::StrCat(prefix, "tools"));
  if (must_call) errors->Unimplemented(path);
}

void CheckResponseFormat(const v1::ResponseFormat& format, const std::string& prefix,
                         Purpose purpose, RequestErrors* errors) {
  const std::string path = absl::StrCat(prefix, "response_format");
  if (format.has_json_object() && !format.json_object()) {
    errors->Invalid(absl::StrCat(path, ".json_object"), "is false; must be true, or not set");
  }
  if (format.has_choice() && format.choice().values_size() == 0) {
    errors->Invalid(absl::StrCat(path, ".choice.values"), "is empty; must have at least one");
  }
  for (int i = 0; i < format.choice().values_size(); ++i) {
    if (format.choice().values(i).empty()) {
      errors->Invalid(At(path, ".choice.values", i), "is empty");
    }
  }
  if (purpose == Purpose::kGenerate && format.format_case() != v1::ResponseFormat::FORMAT_NOT_SET) {
    errors->Unimplemented(path);
  }
}

void CheckSampling(const v1::Sampling& sampling, const ServedModel& model,
                   const std::string& prefix, Purpose purpose, RequestErrors* errors) {
  const auto field = [&prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (sampling.has_temperature()) {
    CheckRange(sampling.temperature(), {0, 2}, field("temperature"), errors);
  }
  if (sampling.has_top_p()) {
    CheckRange(sampling.top_p(), {0, 1, /*low_open=*/true}, field("top_p"), errors);
  }
  if (sampling.has_top_k()) CheckAtLeast(sampling.top_k(), 1, field("top_k"), errors);
  if (sampling.has_min_p()) CheckRange(sampling.min_p(), {0, 1}, field("min_p"), errors);
  if (sampling.has_frequency_penalty()) {
    CheckRange(sampling.frequency_penalty(), {-2, 2}, field("frequency_penalty"), errors);
  }
  if (sampling.has_presence_penalty()) {
    CheckRange(sampling.presence_penalty(), {-2, 2}, field("presence_penalty"), errors);
  }
  if (sampling.has_repetition_penalty()) {
    CheckRange(sampling.repetition_penalty(), {0, 2, /*low_open=*/true},
               field("repetition_penalty"), errors);
  }
  CheckCount(sampling.logit_bias_size(), kMaxLogitBias, field("logit_bias"), errors);
  for (const auto& [id, bias] : sampling.logit_bias()) {
    const std::string path = absl::StrCat(field("logit_bias"), "[", id, "]");
    if (id < 0 || id >= model.vocab_size) {
      errors->Invalid(path, absl::StrCat("is no token; ids are in [0, ", model.vocab_size, ")"));
    }
    CheckRange(bias, {-100, 100}, path, errors);
  }
  CheckTokenIds(sampling.allowed_token_ids(), model, field("allowed_token_ids"), errors);

  if (purpose == Purpose::kRender) return;
  if (sampling.frequency_penalty() != 0) errors->Unimplemented(field("frequency_penalty"));
  if (sampling.presence_penalty() != 0) errors->Unimplemented(field("presence_penalty"));
  if (sampling.has_repetition_penalty() && sampling.repetition_penalty() != 1) {
    errors->Unimplemented(field("repetition_penalty"));
  }
  if (sampling.logit_bias_size() > 0) errors->Unimplemented(field("logit_bias"));
  if (sampling.allowed_token_ids_size() > 0) errors->Unimplemented(field("allowed_token_ids"));
}

void CheckLimits(const v1::Limits& limits, const ServedModel& model, const std::string& prefix,
                 RequestErrors* errors) {
  const auto field = [&prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (limits.has_max_tokens()) CheckAtLeast(limits.max_tokens(), 1, field("max_tokens"), errors);
  if (limits.has_min_tokens()) CheckAtLeast(limits.min_tokens(), 0, field("min_tokens"), errors);
  if (limits.max_tokens() >= 1 && limits.min_tokens() > limits.max_tokens()) {
    errors->Invalid(field("min_tokens"),
                    absl::StrCat("is ", limits.min_tokens(), "; must be at most max_tokens, ",
                                 limits.max_tokens()));
  }
  CheckCount(limits.stop_size(), kMaxStop, field("stop"), errors);
  for (int i = 0; i < limits.stop_size(); ++i) {
    CheckBytes(limits.stop(i), 1, kMaxStopBytes, At(prefix, "stop", i), errors);
  }
  CheckCount(limits.stop_token_ids_size(), kMaxStopTokenIds, field("stop_token_ids"), errors);
  CheckTokenIds(limits.stop_token_ids(), model, field("stop_token_ids"), errors);
  if (limits.has_truncate_prompt_tokens()) {
    CheckAtLeast(limits.truncate_prompt_tokens(), 1, field("truncate_prompt_tokens"), errors);
  }
}

void CheckOutputs(const v1::Outputs& outputs, bool is_chat, const std::string& prefix,
                  Purpose purpose, RequestErrors* errors) {
  const auto field = [&prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (outputs.has_n()) CheckRange(outputs.n(), {1, kMaxN}, field("n"), errors);
  if (outputs.has_logprobs()) {
    CheckRange(outputs.logprobs(), {0, kMaxLogprobs}, field("logprobs"), errors);
  }
  if (outputs.has_prompt_logprobs()) {
    CheckRange(outputs.prompt_logprobs(), {0, kMaxLogprobs}, field("prompt_logprobs"), errors);
    if (is_chat) {
      errors->Invalid(field("prompt_logprobs"), "is for Complete and StreamComplete alone");
    }
  }
  if (purpose == Purpose::kRender) return;
  if (outputs.n() > 1) errors->Unimplemented(field("n"));
  if (outputs.has_logprobs()) errors->Unimplemented(field("logprobs"));
  if (outputs.has_prompt_logprobs()) errors->Unimplemented(field("prompt_logprobs"));
}

void CheckServing(const v1::Serving& serving, const std::string& prefix, RequestErrors* errors) {
  const auto field = [&prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  CheckRequestId(serving.request_id(), field("request_id"), errors);
  if (serving.has_priority()) CheckPriority(serving.priority(), field("priority"), errors);
  CheckBytes(serving.cache_salt(), 0, kMaxCacheSaltBytes, field("cache_salt"), errors);
  if (serving.has_queue_timeout()) {
    const auto& timeout = serving.queue_timeout();
    // What google.protobuf.Duration may hold, and more than nothing.
    const bool valid = timeout.seconds() >= 0 && timeout.seconds() <= 315'576'000'000 &&
                       timeout.nanos() >= 0 && timeout.nanos() <= 999'999'999 &&
                       (timeout.seconds() > 0 || timeout.nanos() > 0);
    if (!valid) {
      errors->Invalid(field("queue_timeout"),
                      absl::StrCat("is ", timeout.seconds(), " s and ", timeout.nanos(),
                                   " ns; must be a valid duration above 0"));
    }
  }
  CheckMetadata(serving.metadata(), field("metadata"), errors);
}

void CheckPriority(int32_t priority, const std::string& field, RequestErrors* errors) {
  CheckRange(priority, {-kMaxPriority, kMaxPriority}, field, errors);
}

void CheckRequestId(const std::string& request_id, const std::string& field,
                    RequestErrors* errors) {
  CheckBytes(request_id, 0, kMaxRequestIdBytes, field, errors);
  if (!std::all_of(request_id.begin(), request_id.end(),
                   [](char c) { return absl::ascii_isprint(static_cast<unsigned char>(c)); })) {
    errors->Invalid(field, "must be printable ASCII");
  }
}

void CheckMetadata(const google::protobuf::Map<std::string, std::string>& metadata,
                   const std::string& field, RequestErrors* errors) {
  CheckCount(metadata.size(), kMaxMetadata, field, errors);
  for (const auto& [key, value] : metadata) {
    CheckBytes(key, 1, kMaxMetadataKeyBytes, absl::StrCat(field, ".key"), errors);
    CheckBytes(value, 0, kMaxMetadataValueBytes, absl::StrCat(field, ".value"), errors);
  }
}

void CheckTokenIds(const google::protobuf::RepeatedField<int32_t>& ids, const ServedModel& model,
                   const std::string& field, RequestErrors* errors) {
  for (int i = 0; i < ids.size(); ++i) {
    if (ids[i] >= 0 && ids[i] < model.vocab_size) continue;
    errors->Invalid(At(field, "", i),
                    absl::StrCat("is ", ids[i], "; must be in [0, ", model.vocab_size, ")"));
  }
}

}  // namespace latentd
