#include "server/client/openai_batch.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "google/rpc/code.pb.h"
#include "server/client/openai_body.h"

namespace latentd {
namespace {

using Json = JsonFields::Json;

constexpr size_t kMaxCustomIdBytes = 256;

// The status that an HTTP gateway gives to a gRPC code (google/rpc/code.proto).
int HttpStatus(int32_t code) {
  switch (code) {
    case google::rpc::INVALID_ARGUMENT:
    case google::rpc::FAILED_PRECONDITION:
    case google::rpc::OUT_OF_RANGE:
      return 400;
    case google::rpc::UNAUTHENTICATED:
      return 401;
    case google::rpc::PERMISSION_DENIED:
      return 403;
    case google::rpc::NOT_FOUND:
      return 404;
    case google::rpc::ALREADY_EXISTS:
    case google::rpc::ABORTED:
      return 409;
    case google::rpc::RESOURCE_EXHAUSTED:
      return 429;
    case google::rpc::CANCELLED:
      return 499;
    case google::rpc::UNIMPLEMENTED:
      return 501;
    case google::rpc::UNAVAILABLE:
      return 503;
    case google::rpc::DEADLINE_EXCEEDED:
      return 504;
    default:
      return 500;
  }
}

Json FinishReasonJson(v1::FinishReason reason) {
  if (reason == v1::FINISH_REASON_UNSPECIFIED) return nullptr;
  return absl::AsciiStrToLower(absl::StripPrefix(v1::FinishReason_Name(reason), "FINISH_REASON_"));
}

Json BytesJson(const std::string& bytes) {
  Json list = Json::array();
  for (const unsigned char byte : bytes) list.push_back(byte);
  return list;
}

Json TokenJson(const v1::TokenLogprob& token) {
  return {
      {"token", token.token()}, {"logprob", token.logprob()}, {"bytes", BytesJson(token.token())}};
}

// Of a chat: a list of tokens.
Json ChatLogprobsJson(const v1::Choice& choice) {
  if (choice.logprobs_size() == 0) return nullptr;
  Json content = Json::array();
  for (const v1::TokenLogprob& token : choice.logprobs()) {
    Json entry = TokenJson(token);
    entry["top_logprobs"] = Json::array();
    for (const v1::TokenLogprob& top : token.top()) entry["top_logprobs"].push_back(TokenJson(top));
    content.push_back(std::move(entry));
  }
  return {{"content", std::move(content)}, {"refusal", nullptr}};
}

// Of a completion: a list for each property.
Json CompletionLogprobsJson(const v1::Choice& choice) {
  if (choice.logprobs_size() == 0) return nullptr;
  Json tokens = Json::array(), logprobs = Json::array(), tops = Json::array(),
       offsets = Json::array();
  size_t offset = 0;
  for (const v1::TokenLogprob& token : choice.logprobs()) {
    Json top = Json::object();
    for (const v1::TokenLogprob& likely : token.top()) top[likely.token()] = likely.logprob();
    tokens.push_back(token.token());
    logprobs.push_back(token.logprob());
    tops.push_back(std::move(top));
    offsets.push_back(offset);
    offset += token.token().size();
  }
  return {{"tokens", std::move(tokens)},
          {"token_logprobs", std::move(logprobs)},
          {"top_logprobs", std::move(tops)},
          {"text_offset", std::move(offsets)}};
}

// By its token's id: logprob, rank and text of each likely token of each position, as vLLM has it;
// null for the first.
Json PromptLogprobsJson(const v1::CompleteResponse& response) {
  Json list = Json::array({nullptr});
  for (const v1::TokenLogprob& token : response.prompt_logprobs()) {
    Json entry = Json::object();
    const auto add = [&entry](const v1::TokenLogprob& one) {
      entry[absl::StrCat(one.token_id())] = {
          {"logprob", one.logprob()}, {"rank", one.rank()}, {"decoded_token", one.token()}};
    };
    add(token);
    for (const v1::TokenLogprob& top : token.top()) add(top);
    list.push_back(std::move(entry));
  }
  return list;
}

Json MessageJson(const v1::Message& message) {
  Json json = {{"role", "assistant"},
               {"content", message.has_content() ? Json(message.content()) : Json(nullptr)},
               {"refusal", nullptr}};
  if (message.has_reasoning()) json["reasoning_content"] = message.reasoning();
  for (const v1::ToolCall& call : message.tool_calls()) {
    json["tool_calls"].push_back(
        {{"id", call.id()},
         {"type", "function"},
         {"function", {{"name", call.name()}, {"arguments", call.arguments()}}}});
  }
  return json;
}

// What OpenAI does not have, under vLLM's names, where there is something.
void AddExtras(const v1::Choice& choice, Json* json) {
  if (choice.has_stop_token_id()) {
    (*json)["stop_reason"] = choice.stop_token_id();
  } else if (!choice.stop_matched().empty()) {
    (*json)["stop_reason"] = choice.stop_matched();
  }
  if (choice.token_ids_size() > 0) (*json)["token_ids"] = choice.token_ids();
}

Json UsageJson(const v1::Usage& usage) {
  return {{"prompt_tokens", usage.prompt_tokens()},
          {"completion_tokens", usage.completion_tokens()},
          {"total_tokens", int64_t{usage.prompt_tokens()} + usage.completion_tokens()},
          {"prompt_tokens_details", {{"cached_tokens", usage.cached_tokens()}}},
          {"completion_tokens_details", {{"reasoning_tokens", usage.reasoning_tokens()}}}};
}

Json ChatBody(const v1::Job& job, const v1::ChatResponse& response) {
  Json choices = Json::array();
  for (const v1::Choice& choice : response.choices()) {
    Json json = {{"index", choice.index()},
                 {"message", MessageJson(choice.message())},
                 {"logprobs", ChatLogprobsJson(choice)},
                 {"finish_reason", FinishReasonJson(choice.finish_reason())}};
    AddExtras(choice, &json);
    choices.push_back(std::move(json));
  }
  return {{"id", absl::StrCat("chatcmpl-", response.request_id())},
          {"object", "chat.completion"},
          {"created", job.create_time().seconds()},
          {"model", response.model()},
          {"choices", std::move(choices)},
          {"usage", UsageJson(response.usage())}};
}

Json CompletionBody(const v1::Job& job, const v1::CompleteResponse& response) {
  Json choices = Json::array();
  for (const v1::Choice& choice : response.choices()) {
    Json json = {{"text", choice.message().content()},
                 {"index", choice.index()},
                 {"logprobs", CompletionLogprobsJson(choice)},
                 {"finish_reason", FinishReasonJson(choice.finish_reason())}};
    AddExtras(choice, &json);
    choices.push_back(std::move(json));
  }
  Json body = {{"id", absl::StrCat("cmpl-", response.request_id())},
               {"object", "text_completion"},
               {"created", job.create_time().seconds()},
               {"model", response.model()},
               {"choices", std::move(choices)},
               {"usage", UsageJson(response.usage())}};
  if (response.prompt_logprobs_size() > 0) body["prompt_logprobs"] = PromptLogprobsJson(response);
  return body;
}

Json ErrorBody(const v1::ItemError& error, int status) {
  Json json;
  json["error"] = {{"message", error.message()},
                   {"type", status < 500 ? "invalid_request_error" : "server_error"},
                   {"param", nullptr},
                   {"code", absl::AsciiStrToLower(error.reason())}};
  return json;
}

Json ResponseJson(int status, std::string request_id, Json body) {
  return {
      {"status_code", status}, {"request_id", std::move(request_id)}, {"body", std::move(body)}};
}

}  // namespace

void ReadOpenAiItem(const Json& line, std::vector<std::string>* errors, v1::BatchItem* item) {
  JsonFields fields(line, "", errors);
  if (!line.is_object()) return;
  item->set_custom_id(fields.String("custom_id").value_or(""));
  if (item->custom_id().empty()) {
    fields.Error("custom_id", "is not set");
  } else if (item->custom_id().size() > kMaxCustomIdBytes) {
    fields.Error("custom_id", absl::StrCat("has ", item->custom_id().size(),
                                           " bytes; must have at most ", kMaxCustomIdBytes));
  }
  if (fields.String("method").value_or("") != "POST") fields.Error("method", "must be POST");
  const std::string url = fields.String("url").value_or("");
  const Json* body = fields.Object("body");
  if (body == nullptr) fields.Error("body", "is not set");
  if (url != "/v1/chat/completions" && url != "/v1/completions") {
    fields.Error("url", "must be /v1/chat/completions or /v1/completions");
  } else if (body != nullptr && url == "/v1/completions") {
    ReadCompletionBody(*body, errors, item->mutable_complete());
  } else if (body != nullptr) {
    ReadChatBody(*body, errors, item->mutable_chat());
  }
  fields.RefuseOthers();
}

bool IsOpenAiOutput(const v1::ItemResult& result) {
  return result.state() == v1::ITEM_STATE_SUCCEEDED;
}

std::string OpenAiResult(const v1::Job& job, const v1::ItemResult& result) {
  const std::string id =
      absl::StrCat("batch_req_", absl::StripPrefix(job.name(), "jobs/"), "_", result.index());
  Json response = nullptr, error = nullptr;
  if (result.has_chat()) {
    response = ResponseJson(200, result.chat().request_id(), ChatBody(job, result.chat()));
  } else if (result.has_complete()) {
    response =
        ResponseJson(200, result.complete().request_id(), CompletionBody(job, result.complete()));
  } else if (result.state() == v1::ITEM_STATE_EXPIRED) {
    error = {
        {"code", "batch_expired"},
        {"message", "This request could not be executed before the completion window expired."}};
  } else if (result.state() == v1::ITEM_STATE_CANCELLED) {
    error = {{"code", "batch_cancelled"},
             {"message", "The batch was cancelled before this request was executed."}};
  } else {
    const int status = HttpStatus(result.error().code());
    response = ResponseJson(status, id, ErrorBody(result.error(), status));
  }
  const Json line = {{"id", id},
                     {"custom_id", result.custom_id()},
                     {"response", std::move(response)},
                     {"error", std::move(error)}};
  // A token may end within a character; that must not lose the line.
  return line.dump(-1, ' ', false, Json::error_handler_t::replace);
}

}  // namespace latentd
