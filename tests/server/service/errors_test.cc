// Errors as they arrive at a client, and bytes that no well-meaning client sends.

#include <string>

#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

class ErrorsTest : public ServiceTest {
 protected:
  // A call with any bytes.
  grpc::Status CallRaw(const std::string& method, const std::string& bytes) {
    grpc::GenericStub generic(under_test_.NewChannel());
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const grpc::Slice slice(bytes);
    const grpc::ByteBuffer request(&slice, 1);
    const auto call = generic.PrepareUnaryCall(&context, "/latentd.v1.InferenceService/" + method,
                                               request, &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, &status);
    void* tag;
    bool ok;
    queue.Next(&tag, &ok);
    return status;
  }
};

const char* const kMethods[] = {"Chat",           "StreamChat", "Complete",
                                "StreamComplete", "RenderChat", "Tokenize",
                                "Detokenize",     "GetModel",   "ListModels"};

TEST_F(ErrorsTest, GarbledMessagesAreRefusedByEveryMethod) {
  for (const char* method : kMethods) {
    // A field that claims more bytes than there are; a group that never ends; a bad tag.
    for (const std::string& bytes :
         {std::string("\x0a\x7f"
                      "abc"),
          std::string("\x0b"), std::string("\x00", 1), std::string(40, '\xff')}) {
      const Error error = Explain(CallRaw(method, bytes));
      EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT) << method;
      EXPECT_EQ(error.reason, "MALFORMED_MESSAGE") << method;
    }
  }
}

TEST_F(ErrorsTest, InvalidUtf8IsRefused) {
  v1::TokenizeRequest request;
  request.set_text("abcd");
  std::string bytes = request.SerializeAsString();
  bytes.replace(bytes.find("abcd"), 4, "a\xc3\x28z");
  const Error error = Explain(CallRaw("Tokenize", bytes));
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(error.reason, "MALFORMED_MESSAGE");
  EXPECT_THAT(error.message, testing::HasSubstr("UTF-8"));
  EXPECT_EQ(error.metadata.at("type"), "latentd.v1.TokenizeRequest");
}

// A length-delimited field.
std::string Field(char tag, const std::string& value) {
  std::string bytes(1, tag);
  for (size_t size = value.size(); true; size >>= 7) {
    bytes.push_back(static_cast<char>((size & 0x7f) | (size > 0x7f ? 0x80 : 0)));
    if (size <= 0x7f) break;
  }
  return bytes + value;
}

TEST_F(ErrorsTest, DeepNestingIsRefusedNotFollowed) {
  // template_kwargs is the one recursive field: [[[[...]]]], as Value.list_value = 6,
  // ListValue.values = 1.
  std::string value;
  for (int depth = 0; depth < 10000; ++depth) value = Field('\x0a', Field('\x32', value));
  const std::string kwargs =
      Field('\x0a', Field('\x0a', "x") + Field('\x12', Field('\x32', value)));
  const std::string bytes = UserSays("Hello?").SerializeAsString() + Field('\x32', kwargs);
  EXPECT_EQ(Explain(CallRaw("Chat", bytes)).reason, "MALFORMED_MESSAGE");
}

TEST_F(ErrorsTest, UnknownFieldsAreIgnored) {
  engine_.Say({1});
  // Field 1000, a string: of a later version of the API.
  const std::string bytes = UserSays("Hello?").SerializeAsString() +
                            "\xc2\x3e\x03"
                            "new";
  EXPECT_TRUE(CallRaw("Chat", bytes).ok());
}

TEST_F(ErrorsTest, AHugeMessageIsRefusedAndTheNextIsServed) {
  engine_.Say({1});
  const Streamed huge = StreamChat(stub(), UserSays(std::string(2 << 20, 'x')));
  EXPECT_EQ(huge.status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(StreamChat(stub(), UserSays("Hello?")).status.ok());
}

TEST_F(ErrorsTest, ErrorsOfAllMethodsCarryDetails) {
  v1::ChatRequest chat = UserSays("Hello?");
  chat.mutable_sampling()->set_temperature(9);
  v1::CompleteRequest complete;
  complete.set_text("Hello");
  complete.mutable_sampling()->set_temperature(9);
  grpc::ClientContext chat_context, complete_context;
  v1::ChatResponse chat_response;
  v1::CompleteResponse complete_response;
  for (const grpc::Status& status :
       {stub().Chat(&chat_context, chat, &chat_response),
        stub().Complete(&complete_context, complete, &complete_response),
        StreamChat(stub(), chat).status, StreamComplete(stub(), complete).status}) {
    const Error error = Explain(status);
    EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(error.violations.at("sampling.temperature"), "is 9; must be in [0, 2]");
  }
  const RequestRecord record = under_test_.observer().AwaitFinished(4);
  EXPECT_EQ(record.reason, "INVALID_FIELD");
  EXPECT_EQ(record.completion_tokens, 0);
  EXPECT_FALSE(record.queue.has_value());
  EXPECT_EQ(under_test_.observer().rejected().size(), 4u);
}

TEST_F(ErrorsTest, AsManyViolationsAsThereAreFitIntoTheTrailers) {
  v1::ChatRequest request = UserSays("Hello?");
  for (int i = 0; i < 1000; ++i) request.add_messages();
  const Error error = Explain(StreamChat(stub(), request).status);
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_GE(error.violations.size(), 10u);
  request = UserSays("Hello?");
  request.set_model(std::string(500000, 'x'));
  EXPECT_EQ(Explain(StreamChat(stub(), request).status).reason, "MODEL_NOT_FOUND");
}

TEST_F(ErrorsTest, WhatCanNeverFitIsRefused) {
  EngineInfo info = DemoEngineInfo();
  info.num_blocks = 2;  // 128 tokens of cache
  ScriptedEngine engine(info);
  ServiceUnderTest small(&engine, {});
  v1::CompleteRequest request;
  request.mutable_tokens()->mutable_ids()->Resize(200, 5);
  const Error error = Explain(StreamComplete(small.stub(), request).status);
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(error.reason, "REQUEST_TOO_LARGE");
}

}  // namespace
}  // namespace latentd
