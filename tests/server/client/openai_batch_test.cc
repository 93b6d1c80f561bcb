#include "server/client/openai_batch.h"

#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>

namespace latentd {
namespace {

using Json = JsonFields::Json;
using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::UnorderedElementsAre;

// An item of a body; what is wrong goes to `errors`.
v1::BatchItem Read(const std::string& url, const std::string& body,
                   std::vector<std::string>* errors) {
  const Json line = {
      {"custom_id", "a"}, {"method", "POST"}, {"url", url}, {"body", Json::parse(body)}};
  v1::BatchItem item;
  ReadOpenAiItem(line, errors, &item);
  return item;
}

v1::ChatRequest Chat(const std::string& body) {
  std::vector<std::string> errors;
  v1::BatchItem item = Read("/v1/chat/completions", body, &errors);
  EXPECT_THAT(errors, IsEmpty()) << body;
  EXPECT_EQ(item.custom_id(), "a");
  return item.chat();
}

v1::CompleteRequest Completion(const std::string& body) {
  std::vector<std::string> errors;
  v1::BatchItem item = Read("/v1/completions", body, &errors);
  EXPECT_THAT(errors, IsEmpty()) << body;
  return item.complete();
}

std::vector<std::string> ChatErrors(const std::string& fields) {
  std::vector<std::string> errors;
  Read("/v1/chat/completions",
       R"({"messages": [{"role": "user", "content": "Hi"}])" +
           (fields.empty() ? "" : ", " + fields) + "}",
       &errors);
  return errors;
}

template <typename Message>
void ExpectMessage(const Message& message, const std::string& text) {
  Message expected;
  ASSERT_TRUE(google::protobuf::TextFormat::ParseFromString(text, &expected)) << text;
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(message, expected))
      << message.DebugString() << "expected\n"
      << expected.DebugString();
}

TEST(OpenAiRequestTest, APlainChatIsNothingMore) {
  ExpectMessage(Chat(R"({"model": "m", "messages": [{"role": "user", "content": "Hi"}]})"),
                R"(model: "m" messages { role: ROLE_USER content: "Hi" })");
}

TEST(OpenAiRequestTest, EveryFieldOfAChat) {
  ExpectMessage(Chat(R"({
        "messages": [
          {"role": "system", "content": "Be brief."},
          {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
          {"role": "user", "content": "Rain?"},
          {"role": "assistant", "content": null, "reasoning_content": "Hm.", "refusal": null,
           "tool_calls": [{"id": "c1", "type": "function",
                           "function": {"name": "f", "arguments": "{\"x\": 1}"}}]},
          {"role": "tool", "tool_call_id": "c1", "name": "f", "content": ""},
          {"role": "assistant", "content": "It"}],
        "temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125,
        "frequency_penalty": 1, "presence_penalty": -1.5, "repetition_penalty": 1.5,
        "logit_bias": {"5": -100, "6": 1.5}, "allowed_token_ids": [5, 6],
        "seed": 18446744073709551615, "n": 2, "logprobs": true, "top_logprobs": 3,
        "max_completion_tokens": 9, "min_tokens": 2, "stop": ["x", "y"], "stop_token_ids": [1],
        "include_stop_str_in_output": true, "ignore_eos": true, "truncate_prompt_tokens": 50,
        "skip_special_tokens": false, "return_token_ids": true, "parse_control_tokens": true,
        "response_format": {"type": "json_object"},
        "tools": [{"type": "function", "function": {"name": "f", "description": "d", "strict": false,
                   "parameters": {"type": "object", "properties": {"z": {}, "a": {"const": 1.0}}}}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": true,
        "chat_template_kwargs": {"enable_thinking": false}, "chat_template": "{{ messages }}",
        "thinking": {"type": "enabled"}, "continue_final_message": true,
        "add_generation_prompt": false, "cache_salt": "s", "metadata": {"k": "v"}, "user": "u",
        "stream": false, "stream_options": null, "store": false, "service_tier": "auto"})"),
                R"(
        messages { role: ROLE_SYSTEM content: "Be brief." }
        messages { role: ROLE_SYSTEM content: "a\nb" }
        messages { role: ROLE_USER content: "Rain?" }
        messages { role: ROLE_ASSISTANT reasoning: "Hm."
                   tool_calls { id: "c1" name: "f" arguments: "{\"x\": 1}" } }
        messages { role: ROLE_TOOL content: "" tool_call_id: "c1" name: "f" }
        messages { role: ROLE_ASSISTANT content: "It" }
        tools { name: "f" description: "d"
                parameters: "{\"type\":\"object\",\"properties\":{\"z\":{},\"a\":{\"const\":1.0}}}" }
        tool_choice { function: "f" }
        response_format { json_object: true }
        template_kwargs { fields { key: "enable_thinking" value { bool_value: false } } }
        thinking: true continue_final_message: true parse_control_tokens: true
        chat_template: "{{ messages }}"
        sampling { temperature: 0.5 top_p: 0.25 top_k: 7 min_p: 0.125 frequency_penalty: 1
                   presence_penalty: -1.5 repetition_penalty: 1.5 seed: 18446744073709551615
                   logit_bias { key: 5 value: -100 } logit_bias { key: 6 value: 1.5 }
                   allowed_token_ids: [5, 6] }
        limits { max_tokens: 9 min_tokens: 2 stop: ["x", "y"] stop_token_ids: 1 include_stop: true
                 ignore_eos: true truncate_prompt_tokens: 50 }
        outputs { n: 2 logprobs: 3 token_ids: true skip_special_tokens: false }
        serving { cache_salt: "s" metadata { key: "k" value: "v" }
                  metadata { key: "user" value: "u" } })");
}

TEST(OpenAiRequestTest, EveryFieldOfACompletion) {
  ExpectMessage(Completion(R"({"model": "m", "prompt": [5, 0, 7], "echo": true, "logprobs": 2,
        "prompt_logprobs": 1, "max_tokens": 3, "best_of": 1, "add_special_tokens": true,
        "stop": "end", "top_k": -1, "temperature": 0, "suffix": null,
        "structured_outputs": {"choice": ["yes", "no"]}})"),
                R"(model: "m" tokens { ids: [5, 0, 7] } echo: true add_special_tokens: true
        response_format { choice { values: ["yes", "no"] } }
        sampling { temperature: 0 } limits { max_tokens: 3 stop: "end" }
        outputs { logprobs: 2 prompt_logprobs: 1 })");
}

TEST(OpenAiRequestTest, ACompletionWithoutALimitHasOpenAisOwn) {
  ExpectMessage(Completion(R"({"prompt": "Once"})"), R"(text: "Once" limits { max_tokens: 16 })");
  EXPECT_EQ(Completion(R"({"prompt": ["Once"]})").text(), "Once");
}

TEST(OpenAiRequestTest, ResponseFormats) {
  const std::string user = R"("messages": [{"role": "user", "content": "Hi"}])";
  EXPECT_FALSE(
      Chat("{" + user + R"(, "response_format": {"type": "text"}})").has_response_format());
  EXPECT_EQ(Chat("{" + user + R"(, "response_format": {"type": "json_schema", "json_schema":
      {"name": "n", "strict": true, "schema": {"type": "object", "b": 1, "a": 2}}}})")
                .response_format()
                .json_schema(),
            R"({"type":"object","b":1,"a":2})");
  EXPECT_EQ(
      Chat("{" + user + R"(, "structured_outputs": {"regex": "a+"}})").response_format().regex(),
      "a+");
  EXPECT_THAT(ChatErrors(R"("response_format": {"type": "json_schema"})"),
              ElementsAre("body.response_format.json_schema.schema: is not set"));
}

TEST(OpenAiRequestTest, WhatIsNotServedIsAnErrorWithItsName) {
  EXPECT_THAT(ChatErrors(""), IsEmpty());
  EXPECT_THAT(ChatErrors(R"("max_token": 5)"),
              ElementsAre("body.max_token: is no field that is served"));
  EXPECT_THAT(ChatErrors(R"("stream": true)"),
              ElementsAre("body.stream: is true; an item of a batch job is answered as a whole"));
  EXPECT_THAT(ChatErrors(R"("priority": 1)"), ElementsAre(HasSubstr("body.priority: ")));
  EXPECT_THAT(ChatErrors(R"("parallel_tool_calls": false)"),
              ElementsAre(HasSubstr("body.parallel_tool_calls: ")));
  EXPECT_THAT(ChatErrors(R"("top_logprobs": 2)"), ElementsAre(HasSubstr("body.top_logprobs: ")));
  EXPECT_THAT(ChatErrors(R"("max_tokens": 1, "max_completion_tokens": 2)"),
              ElementsAre("body.max_completion_tokens: is another than max_tokens"));
  EXPECT_THAT(ChatErrors(R"("add_generation_prompt": false)"),
              ElementsAre(HasSubstr("body.add_generation_prompt: ")));
}

TEST(OpenAiRequestTest, AllOfALineIsTold) {
  EXPECT_THAT(
      ChatErrors(R"("temperature": "hot", "n": 1.5, "stop": 3, "seed": -1, "max_tokens": 3000000000,
                     "logit_bias": {"x": 1}, "stop_token_ids": [1, -2], "tool_choice": "maybe",
                     "tools": [{"type": "function", "function": {"name": "f", "code": ""}}])"),
      UnorderedElementsAre("body.temperature: is a string; must be a number",
                           "body.n: is a number; must be an integer",
                           "body.stop: must be a string or a list of strings",
                           "body.seed: must be an integer, not below 0",
                           "body.max_tokens: is 3000000000; must be in [-2147483648, 2147483647]",
                           "body.logit_bias.x: must be a number under a token's id",
                           "body.stop_token_ids[1]: must be a token's id",
                           "body.tool_choice: must be auto, none, required or a function",
                           "body.tools[0].function.code: is no field that is served"));
}

TEST(OpenAiRequestTest, BadMessages) {
  std::vector<std::string> errors;
  Read("/v1/chat/completions",
       R"({"messages": [{"role": "king", "content": "Hi"}, "Hi", {"role": "user", "name": "Bo",
           "content": [{"type": "image_url", "image_url": {}}]}]})",
       &errors);
  EXPECT_THAT(errors, UnorderedElementsAre(
                          HasSubstr("body.messages[0].role: is 'king'"),
                          "body.messages[1]: is a string; must be an object",
                          "body.messages[2].name: is for the role tool alone",
                          "body.messages[2].content[0].type: must be text",
                          "body.messages[2].content[0].image_url: is no field that is served"));
  errors.clear();
  Read("/v1/chat/completions", "{}", &errors);
  EXPECT_THAT(errors, ElementsAre("body.messages: is empty; must have at least one"));
  errors.clear();
  Read("/v1/completions", R"({"prompt": ["a", "b"]})", &errors);
  EXPECT_THAT(errors, ElementsAre(HasSubstr("body.prompt: must be one string")));
}

TEST(OpenAiRequestTest, BadLines) {
  const auto errors_of = [](const std::string& line) {
    std::vector<std::string> errors;
    v1::BatchItem item;
    ReadOpenAiItem(Json::parse(line), &errors, &item);
    return errors;
  };
  EXPECT_THAT(errors_of("[]"), ElementsAre("the line: is a list; must be an object"));
  EXPECT_THAT(errors_of("{}"),
              ElementsAre("custom_id: is not set", "method: must be POST", "body: is not set",
                          "url: must be /v1/chat/completions or /v1/completions"));
  EXPECT_THAT(errors_of(R"({"custom_id": ")" + std::string(257, 'x') +
                        R"(", "method": "GET", "url": "/v1/embeddings", "body": [], "x": 1})"),
              ElementsAre("custom_id: has 257 bytes; must have at most 256", "method: must be POST",
                          "body: is a list; must be an object", "body: is not set",
                          "url: must be /v1/chat/completions or /v1/completions",
                          "x: is no field that is served"));
}

// Whatever the types and places of values are: no crash, and no item without an error that is not
// made of the body as it is.
TEST(OpenAiRequestTest, AnyValueAnywhereIsReadOrRefused) {
  const Json whole = Json::parse(R"({"custom_id": "a", "method": "POST",
      "url": "/v1/chat/completions", "body": {"messages": [{"role": "assistant", "content": "x",
      "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}], "stop": ["a"],
      "logit_bias": {"1": 2}, "tools": [{"type": "function", "function": {"name": "f"}}],
      "tool_choice": "auto", "response_format": {"type": "json_schema", "json_schema":
      {"schema": {}}}, "thinking": {"type": "enabled"}, "metadata": {"a": "b"}}})");
  const Json flat = whole.flatten();
  const std::vector<Json> values = {nullptr,
                                    true,
                                    -1,
                                    1.5,
                                    18446744073709551615u,
                                    "text",
                                    Json::array(),
                                    Json::array({nullptr}),
                                    Json::object(),
                                    Json::object({{"a", Json::array()}})};
  int num_refused = 0;
  for (const auto& [path, ignored] : flat.items()) {
    for (Json::json_pointer at(path); !at.empty(); at.pop_back()) {
      for (const Json& value : values) {
        Json line = whole;
        line[at] = value;
        std::vector<std::string> errors;
        v1::BatchItem item;
        ReadOpenAiItem(line, &errors, &item);
        num_refused += errors.empty() ? 0 : 1;
        EXPECT_TRUE(item.IsInitialized());
      }
    }
  }
  EXPECT_GT(num_refused, 100);
}

// ---- results ----------------------------------------------------------------------------------

v1::Job SomeJob() {
  v1::Job job;
  job.set_name("jobs/0123456789abcdef0123456789abcdef");
  job.mutable_create_time()->set_seconds(1'700'000'000);
  return job;
}

Json Line(const std::string& result_text) {
  v1::ItemResult result;
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(result_text, &result)) << result_text;
  const std::string line = OpenAiResult(SomeJob(), result);
  EXPECT_EQ(line.find('\n'), std::string::npos);
  return Json::parse(line);
}

TEST(OpenAiResultTest, AChat) {
  EXPECT_EQ(Line(R"(index: 7 custom_id: "a" state: ITEM_STATE_SUCCEEDED attempts: 1 chat {
        request_id: "r1" model: "m" seed: 5
        choices { message { role: ROLE_ASSISTANT content: "Hello\n" reasoning: "Hm." }
                  finish_reason: FINISH_REASON_STOP stop_token_id: 1 }
        usage { prompt_tokens: 3 cached_tokens: 2 completion_tokens: 4 reasoning_tokens: 1 } })"),
            Json::parse(R"({"id": "batch_req_0123456789abcdef0123456789abcdef_7", "custom_id": "a",
        "response": {"status_code": 200, "request_id": "r1", "body": {
          "id": "chatcmpl-r1", "object": "chat.completion", "created": 1700000000, "model": "m",
          "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello\n",
                       "refusal": null, "reasoning_content": "Hm."}, "logprobs": null,
                       "finish_reason": "stop", "stop_reason": 1}],
          "usage": {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7,
                    "prompt_tokens_details": {"cached_tokens": 2},
                    "completion_tokens_details": {"reasoning_tokens": 1}}}},
        "error": null})"));
}

TEST(OpenAiResultTest, ToolCallsAndLogprobs) {
  const Json line = Line(R"(state: ITEM_STATE_SUCCEEDED chat { choices { index: 1
      message { role: ROLE_ASSISTANT tool_calls { id: "c" name: "f" arguments: "{}" } }
      finish_reason: FINISH_REASON_TOOL_CALLS token_ids: [4, 5]
      logprobs { token_id: 4 token: "a\303" logprob: -0.5 rank: 1
                 top { token_id: 4 token: "a" logprob: -0.5 rank: 1 } } } })");
  const Json& choice = line["response"]["body"]["choices"][0];
  EXPECT_EQ(choice["index"], 1);
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_EQ(choice["message"]["content"], nullptr);
  EXPECT_EQ(choice["message"]["tool_calls"], Json::parse(R"([{"id": "c", "type": "function",
                             "function": {"name": "f", "arguments": "{}"}}])"));
  EXPECT_EQ(choice["token_ids"], Json::parse("[4, 5]"));
  EXPECT_EQ(choice["logprobs"]["content"][0]["bytes"], Json::parse("[97, 195]"));
  EXPECT_EQ(choice["logprobs"]["content"][0]["logprob"], -0.5);
  EXPECT_EQ(choice["logprobs"]["content"][0]["top_logprobs"][0]["token"], "a");
}

TEST(OpenAiResultTest, ACompletion) {
  const Json line = Line(R"(state: ITEM_STATE_SUCCEEDED complete { request_id: "r" model: "m"
      choices { message { content: "Once upon" } finish_reason: FINISH_REASON_LENGTH
                logprobs { token_id: 1 token: "Once" logprob: -1 }
                logprobs { token_id: 2 token: " upon" logprob: -2
                           top { token_id: 3 token: " a" logprob: -0.25 } } }
      usage { prompt_tokens: 1 completion_tokens: 2 } })");
  const Json& body = line["response"]["body"];
  EXPECT_EQ(body["id"], "cmpl-r");
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["choices"][0]["text"], "Once upon");
  EXPECT_EQ(body["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(body["choices"][0]["logprobs"],
            Json::parse(R"({"tokens": ["Once", " upon"], "token_logprobs": [-1.0, -2.0],
                            "top_logprobs": [{}, {" a": -0.25}], "text_offset": [0, 4]})"));
  EXPECT_EQ(body["usage"]["total_tokens"], 3);
}

TEST(OpenAiResultTest, Errors) {
  const Json failed = Line(R"(index: 3 custom_id: "b" state: ITEM_STATE_FAILED
      error { code: 3 reason: "PROMPT_TOO_LONG" message: "too long" })");
  EXPECT_EQ(failed["error"], nullptr);
  EXPECT_EQ(failed["response"]["status_code"], 400);
  EXPECT_EQ(failed["response"]["body"],
            Json::parse(R"({"error": {"message": "too long", "type": "invalid_request_error",
                                      "param": null, "code": "prompt_too_long"}})"));
  EXPECT_EQ(Line(R"(state: ITEM_STATE_FAILED error { code: 14 })")["response"]["status_code"], 503);
  EXPECT_EQ(
      Line(R"(state: ITEM_STATE_FAILED error { code: 13 })")["response"]["body"]["error"]["type"],
      "server_error");
  const Json expired = Line(R"(state: ITEM_STATE_EXPIRED error { code: 4 })");
  EXPECT_EQ(expired["response"], nullptr);
  EXPECT_EQ(expired["error"]["code"], "batch_expired");
  EXPECT_EQ(Line(R"(state: ITEM_STATE_CANCELLED error { code: 1 })")["error"]["code"],
            "batch_cancelled");
}

TEST(OpenAiResultTest, OnlySuccessesAreOutput) {
  v1::ItemResult result;
  result.set_state(v1::ITEM_STATE_SUCCEEDED);
  EXPECT_TRUE(IsOpenAiOutput(result));
  for (const auto state :
       {v1::ITEM_STATE_FAILED, v1::ITEM_STATE_CANCELLED, v1::ITEM_STATE_EXPIRED}) {
    result.set_state(state);
    EXPECT_FALSE(IsOpenAiOutput(result));
  }
}

}  // namespace
}  // namespace latentd
