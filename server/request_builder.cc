#include "server/request_builder.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <iterator>
#include <utility>
#include <vector>

#include "absl/random/random.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "server/request_checks.h"
#include "server/status.h"

namespace latentd {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kMaxTemplateBytes = 256 << 10;
constexpr size_t kPromptTailBytes = 256;  // what the reasoning parser may need of the prompt

uint64_t RandomBits() {
  thread_local absl::BitGen generator;
  return absl::Uniform<uint64_t>(generator);
}

// ---- google.protobuf.Struct -> JSON --------------------------------------------------------

Json ToJson(const google::protobuf::Value& value, const std::string& path, RequestErrors* errors);

Json ToJson(const google::protobuf::Struct& object, const std::string& path,
            RequestErrors* errors) {
  // A protobuf map has no order; sorting makes equal requests render equally.
  std::map<std::string, const google::protobuf::Value*> sorted;
  for (const auto& [key, value] : object.fields()) sorted.emplace(key, &value);
  Json json = Json::object();
  for (const auto& [key, value] : sorted) {
    json[key] = ToJson(*value, absl::StrCat(path, ".", key), errors);
  }
  return json;
}

Json ToJson(const google::protobuf::Value& value, const std::string& path, RequestErrors* errors) {
  switch (value.kind_case()) {
    case google::protobuf::Value::kBoolValue:
      return value.bool_value();
    case google::protobuf::Value::kStringValue:
      return value.string_value();
    case google::protobuf::Value::kStructValue:
      return ToJson(value.struct_value(), path, errors);
    case google::protobuf::Value::kListValue: {
      Json list = Json::array();
      for (const auto& element : value.list_value().values()) {
        list.push_back(ToJson(element, absl::StrCat(path, "[", list.size(), "]"), errors));
      }
      return list;
    }
    case google::protobuf::Value::kNumberValue: {
      const double number = value.number_value();
      if (!std::isfinite(number)) {
        errors->Invalid(path, absl::StrCat("is ", number, "; must be finite"));
        return nullptr;
      }
      constexpr double kMaxExact = 9007199254740992.0;  // 2^53
      if (number == std::trunc(number) && std::abs(number) <= kMaxExact) {
        return static_cast<int64_t>(number);
      }
      return number;
    }
    case google::protobuf::Value::kNullValue:
    case google::protobuf::Value::KIND_NOT_SET:
      return nullptr;
  }
  return nullptr;
}

// ---- the conversation ------------------------------------------------------------------------

const char* RoleName(v1::Role role) {
  switch (role) {
    case v1::ROLE_SYSTEM:
      return "system";
    case v1::ROLE_USER:
      return "user";
    case v1::ROLE_ASSISTANT:
      return "assistant";
    default:
      return "tool";
  }
}

// Whether a template says `word` of what it calls arguments: "tojson" in tool['arguments'] |
// tojson.
bool SaysOfArguments(absl::string_view source, absl::string_view word) {
  constexpr absl::string_view kName = "arguments";
  for (size_t at = source.find(kName); at != source.npos; at = source.find(kName, at)) {
    at += kName.size();
    const size_t next = source.find_first_not_of(" '\"]|", at);
    if (next != source.npos && absl::StartsWith(source.substr(next), word)) return true;
  }
  return false;
}

// Whether the template prints tool arguments as JSON itself (V3.1), instead of pasting their text
// (V3, R1) or asking which of the two they are.
bool PrintsArguments(absl::string_view source) {
  return SaysOfArguments(source, "tojson") && !SaysOfArguments(source, "is string");
}

Json ToolCallJson(const v1::ToolCall& call, bool parse_arguments) {
  Json arguments = call.arguments();
  if (parse_arguments) {
    Json parsed = Json::parse(call.arguments(), nullptr, /*allow_exceptions=*/false);
    if (!parsed.is_discarded()) arguments = std::move(parsed);
  }
  return {{"id", call.id()},
          {"type", "function"},
          {"function", {{"name", call.name()}, {"arguments", std::move(arguments)}}}};
}

Json MessageJson(const v1::Message& message, bool parse_arguments) {
  Json json = {{"role", RoleName(message.role())}};
  // Templates ask whether content is none: the key must be there.
  json["content"] = message.has_content() ? Json(message.content()) : Json(nullptr);
  if (message.has_reasoning()) json["reasoning_content"] = message.reasoning();
  for (const v1::ToolCall& call : message.tool_calls()) {
    json["tool_calls"].push_back(ToolCallJson(call, parse_arguments));
  }
  if (!message.tool_call_id().empty()) json["tool_call_id"] = message.tool_call_id();
  if (!message.name().empty()) json["name"] = message.name();
  return json;
}

Json ToolJson(const v1::Tool& tool) {
  Json function = {{"name", tool.name()}, {"description", tool.description()}};
  function["parameters"] = tool.parameters().empty() ? Json::object()
                                                     : Json::parse(tool.parameters(), nullptr,
                                                                   /*allow_exceptions=*/false);
  return {{"type", "function"}, {"function", std::move(function)}};
}

Json KwargsJson(const v1::ChatRequest& chat, const std::string& prefix, RequestErrors* errors) {
  const std::string path = absl::StrCat(prefix, "template_kwargs");
  Json kwargs = ToJson(chat.template_kwargs(), path, errors);
  for (const char* reserved :
       {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}) {
    if (kwargs.contains(reserved)) {
      errors->Invalid(absl::StrCat(path, ".", reserved), "is set by the server");
    }
  }
  if (chat.has_thinking()) {
    for (const char* name : {"thinking", "enable_thinking"}) {
      if (!kwargs.contains(name)) kwargs[name] = chat.thinking();
    }
  }
  return kwargs;
}

// Every field of a conversation but its model. The template's kwargs.
Json CheckFields(const v1::ChatRequest& chat, const ServedModel& model, Purpose purpose,
                 const std::string& prefix, RequestErrors* errors) {
  CheckMessages(chat, prefix, errors);
  CheckTools(chat, prefix, purpose, errors);
  CheckResponseFormat(chat.response_format(), prefix, purpose, errors);
  CheckSampling(chat.sampling(), model, absl::StrCat(prefix, "sampling."), purpose, errors);
  CheckLimits(chat.limits(), model, absl::StrCat(prefix, "limits."), errors);
  CheckOutputs(chat.outputs(), /*is_chat=*/true, absl::StrCat(prefix, "outputs."), purpose, errors);
  CheckServing(chat.serving(), absl::StrCat(prefix, "serving."), errors);
  if (chat.chat_template().size() > kMaxTemplateBytes) {
    errors->Invalid(
        absl::StrCat(prefix, "chat_template"),
        absl::StrCat("has ", chat.chat_template().size(), " bytes; at most ", kMaxTemplateBytes));
  }
  return KwargsJson(chat, prefix, errors);
}

// The template's kwargs, when nothing is wrong with the conversation.
absl::StatusOr<Json> CheckConversation(const v1::ChatRequest& chat, const ServedModel& model,
                                       Purpose purpose, bool allow_request_chat_template,
                                       const std::string& prefix) {
  RETURN_IF_ERROR(CheckModelName(chat.model(), model));
  RequestErrors errors;
  Json kwargs = CheckFields(chat, model, purpose, prefix, &errors);
  RETURN_IF_ERROR(errors.ToStatus());
  if (chat.has_chat_template() && !allow_request_chat_template) {
    const std::string field = absl::StrCat(prefix, "chat_template");
    return MakeError(absl::StatusCode::kPermissionDenied, "CHAT_TEMPLATE_NOT_ALLOWED",
                     absl::StrCat(field, ": this server takes no template from a request"),
                     {{"field", field}});
  }
  return kwargs;
}

absl::Status TemplateError(const absl::Status& status, const std::string& field) {
  if (!absl::IsInvalidArgument(status)) return status;
  const std::string message(status.message());
  return WithFieldViolations(
      MakeError(absl::StatusCode::kInvalidArgument, "TEMPLATE_ERROR",
                absl::StrCat(field, ": ", message), {{"field", field}, {"error", message}}),
      {{field, message}});
}

absl::StatusOr<RenderedChat> Render(const v1::ChatRequest& chat, const ServedModel& model,
                                    Json kwargs, bool add_generation_prompt,
                                    const std::string& prefix) {
  std::shared_ptr<const ChatTemplate> chat_template = model.chat_template;
  absl::string_view source = model.tokenizer->chat_template();
  if (chat.has_chat_template()) {
    source = chat.chat_template();
    auto compiled = ChatTemplate::Compile(chat.chat_template(), model.tokenizer);
    if (!compiled.ok()) {
      return TemplateError(compiled.status(), absl::StrCat(prefix, "chat_template"));
    }
    chat_template = *std::move(compiled);
  }
  if (chat_template == nullptr) {
    return MakeError(absl::StatusCode::kInvalidArgument, "NO_CHAT_TEMPLATE",
                     absl::StrCat("model ", model.name, " has no chat template; use Complete"),
                     {{"model", model.name}});
  }
  ChatInput input;
  const bool parse_arguments = PrintsArguments(source);
  input.messages = Json::array();
  for (const v1::Message& message : chat.messages()) {
    input.messages.push_back(MessageJson(message, parse_arguments));
  }
  for (const v1::Tool& tool : chat.tools()) input.tools.push_back(ToolJson(tool));
  if (!kwargs.empty()) input.kwargs = std::move(kwargs);
  input.continue_final_message = chat.continue_final_message();
  input.add_generation_prompt = add_generation_prompt && !input.continue_final_message;
  input.parse_control_tokens = chat.parse_control_tokens();
  auto rendered = chat_template->Render(input);
  if (!rendered.ok()) return TemplateError(rendered.status(), absl::StrCat(prefix, "messages"));
  return rendered;
}

// ---- what Chat and Complete have in common ---------------------------------------------------

SamplingParams MakeSampling(const v1::Sampling& sampling, const GenerationDefaults& defaults) {
  const SamplingParams last_resort;
  SamplingParams params;
  params.temperature = sampling.has_temperature()
                           ? sampling.temperature()
                           : defaults.temperature.value_or(last_resort.temperature);
  params.top_p =
      sampling.has_top_p() ? sampling.top_p() : defaults.top_p.value_or(last_resort.top_p);
  params.top_k =
      sampling.has_top_k() ? sampling.top_k() : defaults.top_k.value_or(last_resort.top_k);
  params.min_p =
      sampling.has_min_p() ? sampling.min_p() : defaults.min_p.value_or(last_resort.min_p);
  params.seed = sampling.has_seed() ? sampling.seed() : RandomBits();
  return params;
}

// Keeps the last tokens if the request says so, and refuses what does not fit.
absl::Status FitPrompt(const v1::Limits& limits, const ServedModel& model, const std::string& field,
                       std::vector<TokenId>* prompt) {
  if (limits.has_truncate_prompt_tokens() &&
      prompt->size() > static_cast<size_t>(limits.truncate_prompt_tokens())) {
    prompt->erase(prompt->begin(), prompt->end() - limits.truncate_prompt_tokens());
  }
  if (prompt->empty()) return MakeBadRequest({{field, "has no tokens; must have at least one"}});
  const int64_t max_prompt = model.max_model_len - 1;  // the answer has one at least
  const int64_t num_tokens = static_cast<int64_t>(prompt->size());
  if (num_tokens <= max_prompt) return absl::OkStatus();
  const std::string message =
      absl::StrCat("prompt has ", num_tokens, " tokens; the model accepts ", max_prompt);
  return WithFieldViolations(
      MakeError(absl::StatusCode::kInvalidArgument, "PROMPT_TOO_LONG", message,
                {{"prompt_tokens", absl::StrCat(num_tokens)},
                 {"max_prompt_tokens", absl::StrCat(max_prompt)}}),
      {{field, message}});
}

// ChatRequest and CompleteRequest share these fields by name. `core.prompt` is set.
template <typename Proto>
absl::Status FillCommon(const Proto& proto, const ServedModel& model,
                        const std::string& prompt_field, GenerationRequest* request) {
  const v1::Limits& limits = proto.limits();
  const v1::Serving& serving = proto.serving();
  Request& core = request->core;
  RETURN_IF_ERROR(FitPrompt(limits, model, prompt_field, &core.prompt));

  const int32_t room = model.max_model_len - static_cast<int32_t>(core.prompt.size());
  core.max_new_tokens = limits.has_max_tokens() ? std::min(limits.max_tokens(), room) : room;
  core.min_new_tokens = limits.min_tokens();
  if (core.min_new_tokens > room) {
    return MakeBadRequest({{"limits.min_tokens", absl::StrCat("is ", core.min_new_tokens,
                                                              "; the prompt leaves ", room)}});
  }
  core.stop_token_ids.assign(limits.stop_token_ids().begin(), limits.stop_token_ids().end());
  if (!limits.ignore_eos()) {
    core.stop_token_ids.insert(core.stop_token_ids.end(), model.defaults.eos_token_ids.begin(),
                               model.defaults.eos_token_ids.end());
  }
  core.priority = serving.priority();
  core.cache_salt = serving.cache_salt();
  core.sampling = MakeSampling(proto.sampling(), model.defaults);

  AnswerSpec& answer = request->answer;
  answer.tokenizer = model.tokenizer;
  answer.skip_special_tokens =
      !proto.outputs().has_skip_special_tokens() || proto.outputs().skip_special_tokens();
  answer.stop.assign(limits.stop().begin(), limits.stop().end());
  answer.include_stop = limits.include_stop();
  answer.shown_stop_tokens.assign(limits.stop_token_ids().begin(), limits.stop_token_ids().end());
  answer.min_tokens = core.min_new_tokens;

  request->request_id = serving.request_id().empty() ? absl::StrFormat("req-%016x", RandomBits())
                                                     : serving.request_id();
  request->metadata.insert(serving.metadata().begin(), serving.metadata().end());
  if (serving.has_queue_timeout()) {
    request->queue_timeout = absl::Seconds(serving.queue_timeout().seconds()) +
                             absl::Nanoseconds(serving.queue_timeout().nanos());
  }
  request->send_token_ids = proto.outputs().token_ids();
  return absl::OkStatus();
}

absl::StatusOr<std::vector<TokenId>> EncodeText(const std::string& text, bool add_special_tokens,
                                                bool parse_control_tokens,
                                                const Tokenizer& tokenizer) {
  ASSIGN_OR_RETURN(std::vector<TokenId> tokens, tokenizer.Encode(text, parse_control_tokens));
  if (add_special_tokens) {
    if (const auto bos = tokenizer.TokenId(tokenizer.bos_token())) {
      tokens.insert(tokens.begin(), *bos);
    }
  }
  return tokens;
}

}  // namespace

absl::Status CheckModelName(absl::string_view name, const ServedModel& model) {
  if (name.empty() || name == model.name) return absl::OkStatus();
  return MakeError(absl::StatusCode::kNotFound, "MODEL_NOT_FOUND",
                   absl::StrCat("model ", name, " is not served; ", model.name, " is"),
                   {{"model", std::string(name)}, {"served", model.name}});
}

void CheckChat(const v1::ChatRequest& proto, const ServedModel& model, const std::string& prefix,
               RequestErrors* errors) {
  CheckFields(proto, model, Purpose::kGenerate, prefix, errors);
}

void CheckCompletion(const v1::CompleteRequest& proto, const ServedModel& model,
                     const std::string& prefix, RequestErrors* errors) {
  const auto field = [&prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (proto.prompt_case() == v1::CompleteRequest::PROMPT_NOT_SET) {
    errors->Invalid(field("prompt"), "is not set; must be text or tokens");
  }
  CheckTokenIds(proto.tokens().ids(), model, field("tokens.ids"), errors);
  if (proto.has_tokens() && proto.add_special_tokens()) {
    errors->Invalid(field("add_special_tokens"), "is for a prompt of text");
  }
  if (proto.has_tokens() && proto.parse_control_tokens()) {
    errors->Invalid(field("parse_control_tokens"), "is for a prompt of text");
  }
  CheckResponseFormat(proto.response_format(), prefix, Purpose::kGenerate, errors);
  CheckSampling(proto.sampling(), model, field("sampling."), Purpose::kGenerate, errors);
  CheckLimits(proto.limits(), model, field("limits."), errors);
  CheckOutputs(proto.outputs(), /*is_chat=*/false, field("outputs."), Purpose::kGenerate, errors);
  CheckServing(proto.serving(), field("serving."), errors);
}

absl::StatusOr<GenerationRequest> BuildChat(const v1::ChatRequest& proto, const ServedModel& model,
                                            bool allow_request_chat_template) {
  ASSIGN_OR_RETURN(Json kwargs, CheckConversation(proto, model, Purpose::kGenerate,
                                                  allow_request_chat_template, /*prefix=*/""));
  ASSIGN_OR_RETURN(RenderedChat rendered, Render(proto, model, std::move(kwargs),
                                                 /*add_generation_prompt=*/true, /*prefix=*/""));
  GenerationRequest request;
  request.core.prompt = std::move(rendered.tokens);
  RETURN_IF_ERROR(FillCommon(proto, model, "messages", &request));
  request.answer.split_reasoning = true;
  request.answer.prompt_tail =
      rendered.text.substr(rendered.text.size() - std::min(rendered.text.size(), kPromptTailBytes));
  return request;
}

absl::StatusOr<GenerationRequest> BuildCompletion(const v1::CompleteRequest& proto,
                                                  const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(proto.model(), model));
  RequestErrors errors;
  CheckCompletion(proto, model, /*prefix=*/"", &errors);
  RETURN_IF_ERROR(errors.ToStatus());

  GenerationRequest request;
  if (proto.has_tokens()) {
    request.core.prompt.assign(proto.tokens().ids().begin(), proto.tokens().ids().end());
  } else {
    ASSIGN_OR_RETURN(request.core.prompt,
                     EncodeText(proto.text(), proto.add_special_tokens(),
                                proto.parse_control_tokens(), *model.tokenizer));
  }
  RETURN_IF_ERROR(FillCommon(proto, model, proto.has_tokens() ? "tokens.ids" : "text", &request));
  if (proto.echo()) {
    request.echo = model.tokenizer->Decode(request.core.prompt, request.answer.skip_special_tokens);
  }
  return request;
}

absl::StatusOr<RenderedChat> RenderChat(const v1::RenderChatRequest& proto,
                                        const ServedModel& model,
                                        bool allow_request_chat_template) {
  const std::string prefix = "chat.";
  ASSIGN_OR_RETURN(Json kwargs, CheckConversation(proto.chat(), model, Purpose::kRender,
                                                  allow_request_chat_template, prefix));
  const bool add_generation_prompt =
      !proto.has_add_generation_prompt() || proto.add_generation_prompt();
  if (proto.add_generation_prompt() && proto.chat().continue_final_message()) {
    return MakeBadRequest(
        {{"add_generation_prompt", "cannot be with chat.continue_final_message"}});
  }
  return Render(proto.chat(), model, std::move(kwargs), add_generation_prompt, prefix);
}

absl::StatusOr<std::vector<TokenId>> TokenizeText(const v1::TokenizeRequest& proto,
                                                  const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(proto.model(), model));
  return EncodeText(proto.text(), proto.add_special_tokens(), proto.parse_control_tokens(),
                    *model.tokenizer);
}

absl::StatusOr<std::string> DetokenizeIds(const v1::DetokenizeRequest& proto,
                                          const ServedModel& model) {
  RETURN_IF_ERROR(CheckModelName(proto.model(), model));
  RequestErrors errors;
  CheckTokenIds(proto.token_ids(), model, "token_ids", &errors);
  RETURN_IF_ERROR(errors.ToStatus());
  return model.tokenizer->Decode(
      {proto.token_ids().data(), static_cast<size_t>(proto.token_ids_size())},
      proto.skip_special_tokens());
}

}  // namespace latentd
