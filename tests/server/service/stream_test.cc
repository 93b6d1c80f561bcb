// What a client sees of an answer: order of events, text, reasoning, stops, usage.

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

constexpr TokenId kEos = 1;

std::vector<TokenId> ThenEos(std::vector<TokenId> tokens) {
  tokens.push_back(kEos);
  return tokens;
}

TEST_F(ServiceTest, StreamIsStartedDeltasFinishedUsage) {
  engine_.Say(ThenEos(Ids("Hello, world. This is an answer.")));
  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_serving()->set_request_id("my-id");
  request.mutable_sampling()->set_seed(42);
  const Streamed streamed = StreamChat(stub(), request);

  ASSERT_TRUE(streamed.status.ok()) << streamed.status.error_message();
  ASSERT_GE(streamed.events.size(), 4u);
  ASSERT_TRUE(streamed.events.front().has_started());
  EXPECT_EQ(streamed.started().request_id(), "my-id");
  EXPECT_EQ(streamed.started().model(), "demo");
  EXPECT_EQ(streamed.started().seed(), 42u);
  EXPECT_EQ(streamed.started().prompt_tokens(),
            Ids("<｜begin▁of▁sentence｜><｜User｜>Hello?<｜Assistant｜>").size());
  for (size_t i = 1; i + 2 < streamed.events.size(); ++i) {
    EXPECT_TRUE(streamed.events[i].has_delta()) << i;
  }
  ASSERT_TRUE(streamed.events[streamed.events.size() - 2].has_finished());
  ASSERT_TRUE(streamed.events.back().has_usage());
  EXPECT_EQ(streamed.content(), "Hello, world. This is an answer.");
  EXPECT_EQ(streamed.finished().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(streamed.finished().stop_token_id(), kEos);
  EXPECT_EQ(streamed.finished().stop_matched(), "<｜end▁of▁sentence｜>");
}

}  // namespace
}  // namespace latentd
