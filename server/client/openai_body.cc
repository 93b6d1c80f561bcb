#include "server/client/openai_body.h"

#include <google/protobuf/util/json_util.h>

#include <limits>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace latentd {
namespace {

using Json = JsonFields::Json;

constexpr int32_t kDefaultCompletionTokens = 16;

// Ids into a repeated field.
template <typename Ids>
void ReadIds(JsonFields& fields, absl::string_view name, const Json* list, Ids* ids) {
  if (list == nullptr) return;
  for (size_t i = 0; i < list->size(); ++i) {
    const Json& id = (*list)[i];
    const int64_t value = id.is_number_integer() ? id.get<int64_t>() : -1;
    if (value >= 0 && value <= std::numeric_limits<int32_t>::max()) {
      ids->Add(static_cast<int32_t>(value));
    } else {
      fields.Error(absl::StrCat(name, "[", i, "]"), "must be a token's id");
    }
  }
}

void ReadSampling(JsonFields& fields, v1::Sampling* sampling) {
  const auto number = [&fields](absl::string_view name) -> std::optional<float> {
    const auto value = fields.Number(name);
    return value ? std::optional(static_cast<float>(*value)) : std::nullopt;
  };
  if (const auto value = number("temperature")) sampling->set_temperature(*value);
  if (const auto value = number("top_p")) sampling->set_top_p(*value);
  if (const auto value = number("min_p")) sampling->set_min_p(*value);
  if (const auto value = number("frequency_penalty")) sampling->set_frequency_penalty(*value);
  if (const auto value = number("presence_penalty")) sampling->set_presence_penalty(*value);
  if (const auto value = number("repetition_penalty")) sampling->set_repetition_penalty(*value);
  // -1 and 0 are vLLM's words for no limit.
  if (const auto k = fields.Int32("top_k"); k && *k != -1 && *k != 0) sampling->set_top_k(*k);
  if (const Json* seed = fields.Take("seed")) {
    if (seed->is_number_unsigned()) {
      sampling->set_seed(seed->get<uint64_t>());
    } else {
      fields.Error("seed", "must be an integer, not below 0");
    }
  }
  if (const Json* bias = fields.Object("logit_bias")) {
    for (const auto& [key, value] : bias->items()) {
      int32_t id = 0;
      if (absl::SimpleAtoi(key, &id) && value.is_number()) {
        (*sampling->mutable_logit_bias())[id] = value.get<float>();
      } else {
        fields.Error(absl::StrCat("logit_bias.", key), "must be a number under a token's id");
      }
    }
  }
  ReadIds(fields, "allowed_token_ids", fields.List("allowed_token_ids"),
          sampling->mutable_allowed_token_ids());
}

void ReadLimits(JsonFields& fields, v1::Limits* limits) {
  if (const auto value = fields.Int32("min_tokens")) limits->set_min_tokens(*value);
  if (const auto value = fields.Int32("truncate_prompt_tokens")) {
    limits->set_truncate_prompt_tokens(*value);
  }
  if (const auto value = fields.Bool("ignore_eos")) limits->set_ignore_eos(*value);
  if (const auto value = fields.Bool("include_stop_str_in_output")) {
    limits->set_include_stop(*value);
  }
  ReadIds(fields, "stop_token_ids", fields.List("stop_token_ids"),
          limits->mutable_stop_token_ids());
  const Json* stop = fields.Take("stop");
  if (stop == nullptr) return;
  for (const Json& text : stop->is_array() ? *stop : Json::array({*stop})) {
    if (text.is_string()) {
      limits->add_stop(text.get<std::string>());
    } else {
      fields.Error("stop", "must be a string or a list of strings");
    }
  }
}

void ReadServing(JsonFields& fields, v1::Serving* serving) {
  if (const auto value = fields.String("cache_salt")) serving->set_cache_salt(*value);
  if (const Json* metadata = fields.Object("metadata")) {
    for (const auto& [key, value] : metadata->items()) {
      if (value.is_string()) {
        (*serving->mutable_metadata())[key] = value.get<std::string>();
      } else {
        fields.Error(absl::StrCat("metadata.", key), "must be a string");
      }
    }
  }
  if (const auto user = fields.String("user")) serving->mutable_metadata()->insert({"user", *user});
}

// Fields of requests that want to see tokens as they come, or to overtake others.
void RefuseOnline(JsonFields& fields) {
  if (fields.Bool("stream").value_or(false)) {
    fields.Error("stream", "is true; an item of a batch job is answered as a whole");
  }
  if (fields.Take("priority") != nullptr) fields.Error("priority", "is for the job, not an item");
  if (fields.Bool("store").value_or(false)) fields.Error("store", "is no field that is served");
  const std::string tier = fields.String("service_tier").value_or("auto");
  if (tier != "auto" && tier != "default") {
    fields.Error("service_tier", "must be auto or default");
  }
}

// A schema is text to us; it may come as text, too.
std::string TextOf(const Json& json) {
  return json.is_string() ? json.get<std::string>() : json.dump();
}

void ReadResponseFormat(JsonFields& body, v1::ResponseFormat* format) {
  const Json* json = body.Object("response_format");
  if (json == nullptr) return;
  JsonFields fields(*json, body.PathOf("response_format"), body.errors());
  const std::string type = fields.String("type").value_or("");
  if (type == "json_object") {
    format->set_json_object(true);
  } else if (type == "json_schema") {
    const Json* given = fields.Object("json_schema");
    const Json none = Json::object();
    JsonFields inner(given == nullptr ? none : *given, fields.PathOf("json_schema"), body.errors());
    inner.String("name");  // of the schema: nothing depends on it
    inner.String("description");
    inner.Bool("strict");  // it always is
    if (const Json* schema = inner.Object("schema")) {
      format->set_json_schema(schema->dump());
    } else {
      inner.Error("schema", "is not set");
    }
    inner.RefuseOthers();
  } else if (type != "text") {
    fields.Error("type", "must be text, json_object or json_schema");
  }
  fields.RefuseOthers();
}

void ReadStructuredOutputs(JsonFields& body, v1::ResponseFormat* format) {
  const Json* json = body.Object("structured_outputs");
  if (json == nullptr) return;
  JsonFields fields(*json, body.PathOf("structured_outputs"), body.errors());
  if (format->format_case() != v1::ResponseFormat::FORMAT_NOT_SET || json->size() != 1) {
    body.Error("structured_outputs", "must have one field, and none beside a response_format");
  }
  if (const Json* schema = fields.Take("json")) format->set_json_schema(TextOf(*schema));
  if (fields.Bool("json_object").value_or(false)) format->set_json_object(true);
  if (const auto regex = fields.String("regex")) format->set_regex(*regex);
  if (const auto grammar = fields.String("grammar")) format->set_grammar(*grammar);
  if (const Json* choice = fields.List("choice")) {
    for (const Json& value : *choice) {
      if (value.is_string()) {
        format->mutable_choice()->add_values(value.get<std::string>());
      } else {
        fields.Error("choice", "must be a list of strings");
      }
    }
  }
  fields.RefuseOthers();
}

// What both kinds of request have. Messages are made only where something is set.
template <typename Request>
void ReadCommon(JsonFields& fields, Request* request) {
  if (const auto model = fields.String("model")) request->set_model(*model);
  v1::Sampling sampling;
  ReadSampling(fields, &sampling);
  if (sampling.ByteSizeLong() > 0) *request->mutable_sampling() = sampling;
  v1::Serving serving;
  ReadServing(fields, &serving);
  if (serving.ByteSizeLong() > 0) *request->mutable_serving() = serving;
  v1::ResponseFormat format;
  ReadResponseFormat(fields, &format);
  ReadStructuredOutputs(fields, &format);
  if (format.ByteSizeLong() > 0) *request->mutable_response_format() = format;
  ReadLimits(fields, request->mutable_limits());
  v1::Outputs* outputs = request->mutable_outputs();
  if (const auto n = fields.Int32("n")) outputs->set_n(*n);
  if (const auto value = fields.Bool("skip_special_tokens")) {
    outputs->set_skip_special_tokens(*value);
  }
  if (const auto value = fields.Bool("return_token_ids")) outputs->set_token_ids(*value);
  if (const auto value = fields.Bool("parse_control_tokens")) {
    request->set_parse_control_tokens(*value);
  }
  RefuseOnline(fields);
}

// After everything was read: an empty message need not be sent.
template <typename Request>
void DropEmpty(Request* request) {
  if (request->limits().ByteSizeLong() == 0) request->clear_limits();
  if (request->outputs().ByteSizeLong() == 0) request->clear_outputs();
}

void ReadContent(JsonFields& fields, v1::Message* message) {
  const Json* content = fields.Take("content");
  if (content == nullptr) return;
  if (content->is_string()) {
    message->set_content(content->get<std::string>());
    return;
  }
  if (!content->is_array()) {
    fields.Error("content", "must be a string or a list of parts");
    return;
  }
  std::string text;
  for (size_t i = 0; i < content->size(); ++i) {
    JsonFields part((*content)[i], fields.PathOf(absl::StrCat("content[", i, "]")),
                    fields.errors());
    if (part.String("type").value_or("") != "text") part.Error("type", "must be text");
    // As vLLM joins the parts of a message for templates that know text alone.
    if (i > 0) text += '\n';
    text += part.String("text").value_or("");
    part.RefuseOthers();
  }
  message->set_content(std::move(text));
}

void ReadToolCalls(JsonFields& message_fields, v1::Message* message) {
  const Json* calls = message_fields.List("tool_calls");
  if (calls == nullptr) return;
  for (size_t i = 0; i < calls->size(); ++i) {
    JsonFields fields((*calls)[i], message_fields.PathOf(absl::StrCat("tool_calls[", i, "]")),
                      message_fields.errors());
    v1::ToolCall* call = message->add_tool_calls();
    call->set_id(fields.String("id").value_or(""));
    fields.Take("index");  // streams have it, and histories made of them
    if (fields.String("type").value_or("function") != "function") {
      fields.Error("type", "must be function");
    }
    if (const Json* json = fields.Object("function")) {
      JsonFields function(*json, fields.PathOf("function"), fields.errors());
      call->set_name(function.String("name").value_or(""));
      call->set_arguments(function.String("arguments").value_or(""));
      function.RefuseOthers();
    } else {
      fields.Error("function", "is not set");
    }
    fields.RefuseOthers();
  }
}

void ReadMessage(JsonFields fields, v1::Message* message) {
  const std::string role = fields.String("role").value_or("");
  if (role == "system" || role == "developer") {
    message->set_role(v1::ROLE_SYSTEM);
  } else if (role == "user") {
    message->set_role(v1::ROLE_USER);
  } else if (role == "assistant") {
    message->set_role(v1::ROLE_ASSISTANT);
  } else if (role == "tool") {
    message->set_role(v1::ROLE_TOOL);
  } else {
    fields.Error("role", absl::StrCat("is '", role,
                                      "'; must be system, developer, user, assistant or tool"));
  }
  ReadContent(fields, message);
  const auto reasoning = fields.String("reasoning_content");
  const auto reasoning_too = fields.String("reasoning");  // vLLM's newer name of it
  if (reasoning || reasoning_too) {
    message->set_reasoning(reasoning ? *reasoning : *reasoning_too);
  }
  ReadToolCalls(fields, message);
  if (const auto id = fields.String("tool_call_id")) message->set_tool_call_id(*id);
  if (const auto name = fields.String("name")) {
    if (role == "tool") {
      message->set_name(*name);
    } else {
      fields.Error("name", "is for the role tool alone");
    }
  }
  fields.RefuseOthers();
}

void ReadTools(JsonFields& body, v1::ChatRequest* request) {
  const Json* tools = body.List("tools");
  if (tools == nullptr) return;
  for (size_t i = 0; i < tools->size(); ++i) {
    JsonFields fields((*tools)[i], body.PathOf(absl::StrCat("tools[", i, "]")), body.errors());
    v1::Tool* tool = request->add_tools();
    if (fields.String("type").value_or("") != "function") fields.Error("type", "must be function");
    if (const Json* json = fields.Object("function")) {
      JsonFields function(*json, fields.PathOf("function"), body.errors());
      tool->set_name(function.String("name").value_or(""));
      tool->set_description(function.String("description").value_or(""));
      if (const Json* schema = function.Object("parameters")) tool->set_parameters(schema->dump());
      if (function.Bool("strict").value_or(false)) {
        function.Error("strict", "is true; that is not served");
      }
      function.RefuseOthers();
    } else {
      fields.Error("function", "is not set");
    }
    fields.RefuseOthers();
  }
}

void ReadToolChoice(JsonFields& body, v1::ChatRequest* request) {
  if (!body.Bool("parallel_tool_calls").value_or(true)) {
    body.Error("parallel_tool_calls", "is false; that is not served");
  }
  const Json* choice = body.Take("tool_choice");
  if (choice == nullptr) return;
  const std::string mode = choice->is_string() ? choice->get<std::string>() : "";
  if (choice->is_object()) {
    JsonFields fields(*choice, body.PathOf("tool_choice"), body.errors());
    if (fields.String("type").value_or("") != "function") fields.Error("type", "must be function");
    if (const Json* json = fields.Object("function")) {
      JsonFields function(*json, fields.PathOf("function"), body.errors());
      request->mutable_tool_choice()->set_function(function.String("name").value_or(""));
      function.RefuseOthers();
    } else {
      fields.Error("function", "is not set");
    }
    fields.RefuseOthers();
  } else if (mode == "auto") {
    request->mutable_tool_choice()->set_mode(v1::ToolChoice::MODE_AUTO);
  } else if (mode == "none") {
    request->mutable_tool_choice()->set_mode(v1::ToolChoice::MODE_NONE);
  } else if (mode == "required") {
    request->mutable_tool_choice()->set_mode(v1::ToolChoice::MODE_REQUIRED);
  } else {
    body.Error("tool_choice", "must be auto, none, required or a function");
  }
}

void ReadTemplate(JsonFields& body, v1::ChatRequest* request) {
  if (const Json* kwargs = body.Object("chat_template_kwargs")) {
    const auto parsed = google::protobuf::util::JsonStringToMessage(
        kwargs->dump(), request->mutable_template_kwargs());
    if (!parsed.ok()) body.Error("chat_template_kwargs", std::string(parsed.message()));
  }
  if (const auto text = body.String("chat_template")) request->set_chat_template(*text);
  if (const Json* json = body.Object("thinking")) {
    JsonFields fields(*json, body.PathOf("thinking"), body.errors());
    const std::string type = fields.String("type").value_or("");
    request->set_thinking(type == "enabled");
    if (type != "enabled" && type != "disabled") {
      fields.Error("type", "must be enabled or disabled");
    }
    fields.RefuseOthers();
  }
  const bool go_on = body.Bool("continue_final_message").value_or(false);
  request->set_continue_final_message(go_on);
  if (body.Bool("add_generation_prompt").value_or(!go_on) == go_on) {
    body.Error("add_generation_prompt", "must be false with continue_final_message, else true");
  }
}

void ReadChatLogprobs(JsonFields& body, v1::Outputs* outputs) {
  const bool logprobs = body.Bool("logprobs").value_or(false);
  const auto top = body.Int32("top_logprobs");
  if (logprobs) outputs->set_logprobs(top.value_or(0));
  if (top && !logprobs) body.Error("top_logprobs", "needs logprobs: true");
}

void ReadPrompt(JsonFields& body, v1::CompleteRequest* request) {
  const Json* prompt = body.Take("prompt");
  if (prompt == nullptr) {
    body.Error("prompt", "is not set");
    return;
  }
  // A list of one prompt is one prompt.
  if (prompt->is_array() && prompt->size() == 1 && !(*prompt)[0].is_number()) {
    prompt = &(*prompt)[0];
  }
  if (prompt->is_string()) {
    request->set_text(prompt->get<std::string>());
  } else if (prompt->is_array() && (prompt->empty() || (*prompt)[0].is_number())) {
    ReadIds(body, "prompt", prompt, request->mutable_tokens()->mutable_ids());
  } else {
    body.Error("prompt", "must be one string or one list of tokens: an item has one prompt");
  }
}

}  // namespace

void ReadChatBody(const Json& body, std::vector<std::string>* errors, v1::ChatRequest* request) {
  JsonFields fields(body, "body", errors);
  if (!body.is_object()) return;
  ReadCommon(fields, request);
  if (const Json* messages = fields.List("messages")) {
    for (size_t i = 0; i < messages->size(); ++i) {
      ReadMessage({(*messages)[i], fields.PathOf(absl::StrCat("messages[", i, "]")), errors},
                  request->add_messages());
    }
  }
  if (request->messages_size() == 0) fields.Error("messages", "is empty; must have at least one");
  ReadTools(fields, request);
  ReadToolChoice(fields, request);
  ReadTemplate(fields, request);
  ReadChatLogprobs(fields, request->mutable_outputs());
  const auto max_tokens = fields.Int32("max_tokens");
  const auto max_completion_tokens = fields.Int32("max_completion_tokens");
  if (max_tokens && max_completion_tokens && *max_tokens != *max_completion_tokens) {
    fields.Error("max_completion_tokens", "is another than max_tokens");
  }
  if (const auto tokens = max_completion_tokens ? max_completion_tokens : max_tokens) {
    request->mutable_limits()->set_max_tokens(*tokens);
  }
  fields.RefuseOthers();
  DropEmpty(request);
}

void ReadCompletionBody(const Json& body, std::vector<std::string>* errors,
                        v1::CompleteRequest* request) {
  JsonFields fields(body, "body", errors);
  if (!body.is_object()) return;
  ReadCommon(fields, request);
  ReadPrompt(fields, request);
  if (const auto echo = fields.Bool("echo")) request->set_echo(*echo);
  if (const auto value = fields.Bool("add_special_tokens")) request->set_add_special_tokens(*value);
  v1::Outputs* outputs = request->mutable_outputs();
  if (const auto value = fields.Int32("logprobs")) outputs->set_logprobs(*value);
  if (const auto value = fields.Int32("prompt_logprobs")) outputs->set_prompt_logprobs(*value);
  fields.Integer("best_of", 1, 1);  // of one: as without it
  request->mutable_limits()->set_max_tokens(
      fields.Int32("max_tokens").value_or(kDefaultCompletionTokens));
  fields.RefuseOthers();
  DropEmpty(request);
}

}  // namespace latentd
