// The calls that generate nothing.

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

using testing::ElementsAre;
using testing::ElementsAreArray;
using testing::HasSubstr;

class ModelsTest : public ServiceTest {
 protected:
  v1::RenderChatResponse Render(const v1::RenderChatRequest& request) {
    grpc::ClientContext context;
    v1::RenderChatResponse response;
    const grpc::Status status = stub().RenderChat(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response;
  }
  Error RenderError(const v1::RenderChatRequest& request) {
    grpc::ClientContext context;
    v1::RenderChatResponse response;
    return Explain(stub().RenderChat(&context, request, &response));
  }
};

TEST_F(ModelsTest, RenderShowsWhatChatFeeds) {
  v1::RenderChatRequest request;
  *request.mutable_chat() = UserSays("Hello?");
  const v1::RenderChatResponse rendered = Render(request);
  const std::string text = "<｜begin▁of▁sentence｜><｜User｜>Hello?<｜Assistant｜>";
  EXPECT_EQ(rendered.text(), text);
  EXPECT_THAT(rendered.token_ids(), ElementsAreArray(Ids(text)));
  engine_.Say({1});
  EXPECT_EQ(StreamChat(stub(), request.chat()).started().prompt_tokens(),
            rendered.token_ids_size());

  request.set_add_generation_prompt(false);
  EXPECT_EQ(Render(request).text(), "<｜begin▁of▁sentence｜><｜User｜>Hello?");
}

TEST_F(ModelsTest, ThinkingAndKwargsReachTheTemplate) {
  v1::RenderChatRequest request;
  *request.mutable_chat() = UserSays("Hello?");
  request.mutable_chat()->set_thinking(true);
  EXPECT_THAT(Render(request).text(), testing::EndsWith("<｜Assistant｜><think>\n"));
  // An explicit variable goes before the switch.
  (*request.mutable_chat()->mutable_template_kwargs()->mutable_fields())["thinking"].set_bool_value(
      false);
  EXPECT_THAT(Render(request).text(), testing::EndsWith("<｜Assistant｜>"));
}

TEST_F(ModelsTest, ContinuesTheLastMessage) {
  v1::RenderChatRequest request;
  *request.mutable_chat() = UserSays("Hello?");
  auto* message = request.mutable_chat()->add_messages();
  message->set_role(v1::ROLE_ASSISTANT);
  message->set_content("I am");
  request.mutable_chat()->set_continue_final_message(true);
  EXPECT_THAT(Render(request).text(), testing::EndsWith("<｜Assistant｜>I am"));
  request.set_add_generation_prompt(true);
  EXPECT_EQ(RenderError(request).violations.count("add_generation_prompt"), 1u);
}

TEST_F(ModelsTest, ToolsAreRenderedInTheirOwnOrder) {
  v1::RenderChatRequest request;
  *request.mutable_chat() = UserSays("Weather?");
  auto* tool = request.mutable_chat()->add_tools();
  tool->set_name("get_weather");
  tool->set_description("Tells the weather.");
  tool->set_parameters(R"({"type": "object", "properties": {"z": {"maximum": 1}, "a": {}}})");
  // Not served by Chat in this version, but that does not matter here.
  request.mutable_chat()->mutable_outputs()->set_n(2);
  EXPECT_THAT(Render(request).text(), HasSubstr(R"("properties": {"z": {"maximum": 1}, "a": {}})"));
  auto* call = request.mutable_chat()->add_messages();
  call->set_role(v1::ROLE_ASSISTANT);
  auto* function = call->add_tool_calls();
  function->set_name("get_weather");
  function->set_arguments(R"({"z":  1})");  // pasted as the model wrote it
  auto* result = request.mutable_chat()->add_messages();
  result->set_role(v1::ROLE_TOOL);
  result->set_content("sunny");
  const std::string text = Render(request).text();
  EXPECT_THAT(text, HasSubstr("get_weather\n```json\n{\"z\":  1}\n```"));
  EXPECT_THAT(text, HasSubstr("<｜tool▁output▁begin｜>sunny<｜tool▁output▁end｜>"));
}

TEST_F(ModelsTest, RenderChecksItsFieldsByTheirPath) {
  v1::RenderChatRequest request;
  EXPECT_EQ(RenderError(request).violations.count("chat.messages"), 1u);
  *request.mutable_chat() = UserSays("Hello?");
  request.mutable_chat()->mutable_sampling()->set_top_p(7);
  EXPECT_EQ(RenderError(request).violations.count("chat.sampling.top_p"), 1u);
}

TEST_F(ModelsTest, TokenizeAndDetokenize) {
  v1::TokenizeRequest request;
  request.set_text("Hello, 你好!");
  request.set_add_special_tokens(true);
  grpc::ClientContext context, back_context, empty_context;
  v1::TokenizeResponse tokens;
  ASSERT_TRUE(stub().Tokenize(&context, request, &tokens).ok());
  std::vector<TokenId> expected = Ids("Hello, 你好!");
  expected.insert(expected.begin(), 0);
  EXPECT_THAT(tokens.token_ids(), ElementsAreArray(expected));

  v1::DetokenizeRequest back;
  *back.mutable_token_ids() = tokens.token_ids();
  back.set_skip_special_tokens(true);
  v1::DetokenizeResponse text;
  ASSERT_TRUE(stub().Detokenize(&back_context, back, &text).ok());
  EXPECT_EQ(text.text(), "Hello, 你好!");

  ASSERT_TRUE(stub().Tokenize(&empty_context, {}, &tokens).ok());
  EXPECT_EQ(tokens.token_ids_size(), 0);
}

TEST_F(ModelsTest, TokenizeParsesControlTokensOnlyWhenAsked) {
  v1::TokenizeRequest request;
  request.set_text("<｜User｜>");
  v1::TokenizeResponse tokens;
  grpc::ClientContext plain, parsed;
  ASSERT_TRUE(stub().Tokenize(&plain, request, &tokens).ok());
  EXPECT_GT(tokens.token_ids_size(), 1);
  request.set_parse_control_tokens(true);
  ASSERT_TRUE(stub().Tokenize(&parsed, request, &tokens).ok());
  EXPECT_THAT(tokens.token_ids(), ElementsAreArray(Ids("<｜User｜>")));
  EXPECT_EQ(tokens.token_ids_size(), 1);
}

TEST_F(ModelsTest, DetokenizeRefusesWhatIsNoToken) {
  v1::DetokenizeRequest request;
  request.add_token_ids(5);
  request.add_token_ids(4096);
  grpc::ClientContext context;
  v1::DetokenizeResponse response;
  const Error error = Explain(stub().Detokenize(&context, request, &response));
  EXPECT_EQ(error.violations.at("token_ids[1]"), "is 4096; must be in [0, 4096)");
}

TEST_F(ModelsTest, ModelsTellWhatTheyAre) {
  grpc::ClientContext get_context, list_context, unknown_context;
  v1::GetModelResponse response;
  ASSERT_TRUE(stub().GetModel(&get_context, {}, &response).ok());
  const v1::Model& model = response.model();
  EXPECT_EQ(model.name(), "demo");
  EXPECT_EQ(model.architecture(), "DeepseekV3ForCausalLM");
  EXPECT_EQ(model.max_model_len(), 8192);
  EXPECT_EQ(model.vocab_size(), 4096);
  EXPECT_EQ(model.kv_cache_tokens(), 256 * kBlockSize);
  EXPECT_THAT(model.capabilities(), ElementsAre("chat", "thinking"));
  EXPECT_THAT(model.eos_token_ids(), ElementsAre(1));
  EXPECT_FLOAT_EQ(model.default_sampling().temperature(), 0.6f);
  EXPECT_FLOAT_EQ(model.default_sampling().top_p(), 0.95f);
  EXPECT_FALSE(model.default_sampling().has_top_k());

  v1::ListModelsResponse list;
  ASSERT_TRUE(stub().ListModels(&list_context, {}, &list).ok());
  ASSERT_EQ(list.models_size(), 1);
  EXPECT_EQ(list.models(0).SerializeAsString(), model.SerializeAsString());

  v1::GetModelRequest unknown;
  unknown.set_model("gpt");
  EXPECT_EQ(Explain(stub().GetModel(&unknown_context, unknown, &response)).code,
            grpc::StatusCode::NOT_FOUND);
}

}  // namespace
}  // namespace latentd
