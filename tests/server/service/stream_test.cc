// What a client sees of an answer: order of events, text, reasoning, stops, usage; streamed and
// whole.

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

using testing::ElementsAreArray;

constexpr TokenId kEos = 1;
constexpr char kPrompt[] = "<｜begin▁of▁sentence｜><｜User｜>Hello?<｜Assistant｜>";

std::vector<TokenId> ThenEos(std::vector<TokenId> tokens) {
  tokens.push_back(kEos);
  return tokens;
}

v1::CompleteRequest Continue(const std::string& text) {
  v1::CompleteRequest request;
  request.set_text(text);
  return request;
}

TEST_F(ServiceTest, StreamIsStartedDeltasFinishedUsage) {
  const std::vector<TokenId> answer = Ids("Hello, world. This is an answer.");
  engine_.Say(ThenEos(answer));
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
  EXPECT_EQ(streamed.started().prompt_tokens(), Ids(kPrompt).size());
  for (size_t i = 1; i + 2 < streamed.events.size(); ++i) {
    EXPECT_TRUE(streamed.events[i].has_delta()) << i;
  }
  ASSERT_TRUE(streamed.events[streamed.events.size() - 2].has_finished());
  ASSERT_TRUE(streamed.events.back().has_usage());
  EXPECT_EQ(streamed.content(), "Hello, world. This is an answer.");
  EXPECT_EQ(streamed.finished().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(streamed.finished().stop_token_id(), kEos);
  EXPECT_EQ(streamed.finished().stop_matched(), "<｜end▁of▁sentence｜>");
  EXPECT_EQ(streamed.usage().prompt_tokens(), Ids(kPrompt).size());
  EXPECT_EQ(streamed.usage().completion_tokens(), answer.size() + 1);
  EXPECT_EQ(streamed.usage().reasoning_tokens(), 0);
}

TEST_F(ServiceTest, StartedComesWhenTheFirstStepBegins) {
  engine_.Hold();
  grpc::ClientContext context;
  const auto reader = stub().StreamChat(&context, UserSays("Hello?"));
  v1::GenerationEvent event;
  ASSERT_TRUE(reader->Read(&event));  // though no step has ended
  EXPECT_TRUE(event.has_started());
  engine_.Say({kEos});
  engine_.Release();
  EXPECT_TRUE(ReadAll(*reader).status.ok());
}

TEST_F(ServiceTest, WholeAnswerEqualsTheStreamedOne) {
  engine_.Say(ThenEos(Ids("<think>\nLet me see.\n</think>\n\nIt is 632.")));
  v1::ChatRequest request = UserSays("What is 347 + 285?");
  request.mutable_sampling()->set_seed(7);
  request.mutable_outputs()->set_token_ids(true);
  const Streamed streamed = StreamChat(stub(), request);

  grpc::ClientContext context;
  v1::ChatResponse whole;
  ASSERT_TRUE(stub().Chat(&context, request, &whole).ok());
  ASSERT_EQ(whole.choices_size(), 1);
  const v1::Choice& choice = whole.choices(0);
  EXPECT_EQ(whole.model(), "demo");
  EXPECT_EQ(whole.seed(), 7u);
  EXPECT_EQ(choice.message().role(), v1::ROLE_ASSISTANT);
  EXPECT_EQ(choice.message().content(), "It is 632.");
  EXPECT_EQ(choice.message().content(), streamed.content());
  EXPECT_EQ(choice.message().reasoning(), "Let me see.");
  EXPECT_EQ(choice.message().reasoning(), streamed.reasoning());
  EXPECT_EQ(choice.finish_reason(), streamed.finished().finish_reason());
  EXPECT_EQ(choice.stop_matched(), streamed.finished().stop_matched());
  EXPECT_EQ(choice.stop_token_id(), kEos);
  EXPECT_THAT(choice.token_ids(),
              ElementsAreArray(ThenEos(Ids("<think>\nLet me see.\n</think>\n\nIt is 632."))));
  EXPECT_EQ(whole.usage().completion_tokens(), streamed.usage().completion_tokens());
  EXPECT_EQ(whole.usage().reasoning_tokens(), streamed.usage().reasoning_tokens());
  // Both tags, and what stands between them.
  EXPECT_EQ(whole.usage().reasoning_tokens(), Ids("<think>\nLet me see.\n</think>").size());
}

TEST_F(ServiceTest, ReasoningBeginsInThePrompt) {
  engine_.Say(ThenEos(Ids("Let me see.\n</think>\n\nIt is 632.")));
  v1::ChatRequest request = UserSays("What is 347 + 285?");
  request.set_thinking(true);
  const Streamed streamed = StreamChat(stub(), request);
  EXPECT_EQ(streamed.reasoning(), "Let me see.");
  EXPECT_EQ(streamed.content(), "It is 632.");
  EXPECT_EQ(streamed.usage().reasoning_tokens(), Ids("Let me see.\n</think>").size());
}

TEST_F(ServiceTest, CompleteDoesNotSplitReasoning) {
  engine_.Say(ThenEos(Ids("<think>\nno\n</think>")));
  EXPECT_EQ(StreamComplete(stub(), Continue("Well")).content(), "<think>\nno\n</think>");
}

TEST_F(ServiceTest, NeverSendsHalfACharacter) {
  const std::string text = "naïve — 你好 🙂 ok";
  engine_.Say(ThenEos(Ids(text)));
  const Streamed streamed = StreamChat(stub(), UserSays("Hello?"));
  EXPECT_EQ(streamed.content(), text);  // protobuf refuses a string that is not UTF-8
}

TEST_F(ServiceTest, TokenIdsComeWithTheText) {
  const std::vector<TokenId> answer = ThenEos(Ids("你好 hello"));
  engine_.Say(answer);
  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_outputs()->set_token_ids(true);
  std::vector<TokenId> ids;
  for (const auto& event : StreamChat(stub(), request).events) {
    ids.insert(ids.end(), event.delta().token_ids().begin(), event.delta().token_ids().end());
  }
  EXPECT_EQ(ids, answer);
}

TEST_F(ServiceTest, StopStringAcrossTokens) {
  engine_.Say(Ids("one two three four five six seven eight nine ten"));
  v1::ChatRequest request = UserSays("Count.");
  request.mutable_limits()->add_stop("never");
  request.mutable_limits()->add_stop("ree fo");
  const Streamed streamed = StreamChat(stub(), request);
  EXPECT_EQ(streamed.content(), "one two th");
  EXPECT_EQ(streamed.finished().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(streamed.finished().stop_matched(), "ree fo");
  EXPECT_FALSE(streamed.finished().has_stop_token_id());
  // The core knows no text: it is told, and its blocks come back.
  EXPECT_TRUE(Eventually([&] { return under_test_.core().stats().num_running == 0; }));

  request.mutable_limits()->set_include_stop(true);
  EXPECT_EQ(StreamChat(stub(), request).content(), "one two three fo");
}

TEST_F(ServiceTest, StopStringThatDoesNotCompleteIsSent) {
  engine_.Say(ThenEos(Ids("one two three")));
  v1::ChatRequest request = UserSays("Count.");
  request.mutable_limits()->add_stop("three four");
  EXPECT_EQ(StreamChat(stub(), request).content(), "one two three");
}

TEST_F(ServiceTest, MinTokensHoldsStopStringsBack) {
  engine_.Say(ThenEos(Ids("stop and stop again")));
  v1::ChatRequest request = UserSays("Go.");
  request.mutable_limits()->add_stop("stop");
  EXPECT_EQ(StreamChat(stub(), request).content(), "");
  request.mutable_limits()->set_min_tokens(static_cast<int>(Ids("stop").size()));
  EXPECT_EQ(StreamChat(stub(), request).content(), "stop and ");
}

TEST_F(ServiceTest, StopTokenOfTheRequest) {
  const TokenId stop = Ids(" three").front();
  engine_.Say(Ids("one two three four"));
  v1::ChatRequest request = UserSays("Count.");
  request.mutable_limits()->add_stop_token_ids(stop);
  Streamed streamed = StreamChat(stub(), request);
  EXPECT_EQ(streamed.content(), "one two");
  EXPECT_EQ(streamed.finished().finish_reason(), v1::FINISH_REASON_STOP);
  EXPECT_EQ(streamed.finished().stop_token_id(), stop);
  request.mutable_limits()->set_include_stop(true);
  streamed = StreamChat(stub(), request);
  EXPECT_EQ(streamed.content(), absl::StrCat("one two", streamed.finished().stop_matched()));
}

TEST_F(ServiceTest, IncludeStopNeverShowsTheEndToken) {
  engine_.Say(ThenEos(Ids("Hello")));
  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_limits()->set_include_stop(true);
  request.mutable_outputs()->set_skip_special_tokens(false);
  EXPECT_EQ(StreamChat(stub(), request).content(), "Hello");
}

TEST_F(ServiceTest, IgnoreEosGoesOnToTheLimit) {
  engine_.Say({Ids(" a").front(), kEos, Ids(" b").front()});
  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_limits()->set_ignore_eos(true);
  request.mutable_limits()->set_max_tokens(4);
  Streamed streamed = StreamChat(stub(), request);
  EXPECT_EQ(streamed.content(), " a b b");
  EXPECT_EQ(streamed.finished().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(streamed.finished().stop_matched(), "");
  EXPECT_FALSE(streamed.finished().has_stop_token_id());
  EXPECT_EQ(streamed.usage().completion_tokens(), 4);

  request.mutable_outputs()->set_skip_special_tokens(false);
  EXPECT_EQ(StreamChat(stub(), request).content(), " a<｜end▁of▁sentence｜> b b");
}

TEST_F(ServiceTest, TheModelsLengthEndsAnAnswer) {
  engine_.Say({Ids(" a").front()});
  v1::CompleteRequest request;
  request.mutable_tokens()->mutable_ids()->Resize(8190, 5);
  request.mutable_limits()->set_max_tokens(1000);  // the length leaves 2
  const Streamed streamed = StreamComplete(stub(), request);
  EXPECT_EQ(streamed.finished().finish_reason(), v1::FINISH_REASON_LENGTH);
  EXPECT_EQ(streamed.usage().completion_tokens(), 2);
}

TEST_F(ServiceTest, EchoSendsThePromptFirst) {
  engine_.Say(ThenEos(Ids(" world")));
  v1::CompleteRequest request = Continue("Hello");
  request.set_echo(true);
  request.mutable_limits()->add_stop("Hell");  // is not looked for in the prompt
  EXPECT_EQ(StreamComplete(stub(), request).content(), "Hello world");
  grpc::ClientContext context;
  v1::CompleteResponse whole;
  ASSERT_TRUE(stub().Complete(&context, request, &whole).ok());
  EXPECT_EQ(whole.choices(0).message().content(), "Hello world");
}

TEST_F(ServiceTest, CompleteTakesTokensAndPutsTheBeginToken) {
  engine_.Say({kEos});
  v1::CompleteRequest request;
  for (const TokenId id : {5, 6, 7}) request.mutable_tokens()->add_ids(id);
  EXPECT_EQ(StreamComplete(stub(), request).usage().prompt_tokens(), 3);

  request = Continue("Hello");
  const int plain = StreamComplete(stub(), request).usage().prompt_tokens();
  EXPECT_EQ(plain, Ids("Hello").size());
  request.set_add_special_tokens(true);
  EXPECT_EQ(StreamComplete(stub(), request).usage().prompt_tokens(), plain + 1);
}

TEST_F(ServiceTest, CachedTokensAreToldAndSaltsDoNotShare) {
  engine_.Say({kEos});
  v1::CompleteRequest request;
  request.mutable_tokens()->mutable_ids()->Resize(3 * kBlockSize + 1, 5);
  EXPECT_EQ(StreamComplete(stub(), request).usage().cached_tokens(), 0);
  const Streamed again = StreamComplete(stub(), request);
  EXPECT_EQ(again.started().cached_tokens(), 3 * kBlockSize);
  EXPECT_EQ(again.usage().cached_tokens(), 3 * kBlockSize);
  request.mutable_serving()->set_cache_salt("mine");
  EXPECT_EQ(StreamComplete(stub(), request).usage().cached_tokens(), 0);
}

TEST_F(ServiceTest, TruncationKeepsTheLastTokens) {
  engine_.Say({kEos});
  v1::CompleteRequest request;
  request.mutable_tokens()->mutable_ids()->Resize(10000, 5);  // more than the model accepts
  request.mutable_limits()->set_truncate_prompt_tokens(100);
  EXPECT_EQ(StreamComplete(stub(), request).usage().prompt_tokens(), 100);

  request = Continue("one two three");
  request.set_echo(true);
  request.mutable_limits()->set_truncate_prompt_tokens(1);
  EXPECT_EQ(StreamComplete(stub(), request).content(),
            DemoModel()->tokenizer->Decode({&Ids("one two three").back(), 1}, true));
}

TEST_F(ServiceTest, UnsetSamplingIsTheModelsOwn) {
  engine_.Say({kEos});
  ASSERT_TRUE(StreamChat(stub(), UserSays("Hello?")).status.ok());
  SamplingParams sampling = engine_.last_sampling();
  EXPECT_FLOAT_EQ(sampling.temperature, 0.6f);
  EXPECT_FLOAT_EQ(sampling.top_p, 0.95f);
  EXPECT_EQ(sampling.top_k, 0);
  EXPECT_EQ(sampling.min_p, 0);

  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_sampling()->set_temperature(0);
  request.mutable_sampling()->set_top_p(0.5f);
  request.mutable_sampling()->set_top_k(3);
  request.mutable_sampling()->set_min_p(0.25f);
  request.mutable_sampling()->set_seed(0);
  ASSERT_TRUE(StreamChat(stub(), request).status.ok());
  sampling = engine_.last_sampling();
  EXPECT_EQ(sampling.temperature, 0);
  EXPECT_EQ(sampling.top_p, 0.5f);
  EXPECT_EQ(sampling.top_k, 3);
  EXPECT_EQ(sampling.min_p, 0.25f);
  EXPECT_EQ(sampling.seed, 0u);
}

TEST_F(ServiceTest, ARequestWithoutSeedGetsOneAndIsTold) {
  engine_.Say({kEos});
  const Streamed first = StreamChat(stub(), UserSays("Hello?"));
  EXPECT_EQ(first.started().seed(), engine_.last_sampling().seed);
  const Streamed second = StreamChat(stub(), UserSays("Hello?"));
  EXPECT_NE(first.started().seed(), second.started().seed());
  EXPECT_NE(first.started().request_id(), second.started().request_id());
  EXPECT_THAT(first.started().request_id(), testing::MatchesRegex("req-[0-9a-f]{16}"));
}

TEST_F(ServiceTest, TimingsAddUp) {
  engine_.Say(ThenEos(Ids("one two three four")));
  const absl::Time begin = absl::Now();
  const v1::Usage usage = StreamChat(stub(), UserSays("Hello?")).usage();
  const absl::Duration elapsed = absl::Now() - begin;
  absl::Duration sum;
  for (const auto& part : {usage.timings().queue_duration(), usage.timings().prefill_duration(),
                           usage.timings().decode_duration()}) {
    EXPECT_GE(part.seconds(), 0);
    EXPECT_GE(part.nanos(), 0);
    sum += absl::Seconds(part.seconds()) + absl::Nanoseconds(part.nanos());
  }
  EXPECT_GT(sum, absl::ZeroDuration());
  EXPECT_LE(sum, elapsed);
}

TEST_F(ServiceTest, TheObserverHearsOfTheWholeCall) {
  const std::vector<TokenId> answer = ThenEos(Ids("one two three"));
  engine_.Say(answer);
  v1::ChatRequest request = UserSays("Hello?");
  request.mutable_serving()->set_request_id("mine");
  (*request.mutable_serving()->mutable_metadata())["team"] = "blue";
  ASSERT_TRUE(StreamChat(stub(), request).status.ok());
  const RequestRecord record = under_test_.observer().AwaitFinished(1);
  EXPECT_EQ(record.method, "StreamChat");
  EXPECT_EQ(record.request_id, "mine");
  EXPECT_EQ(record.metadata.at("team"), "blue");
  EXPECT_EQ(record.code, absl::StatusCode::kOk);
  EXPECT_EQ(record.reason, "");
  EXPECT_EQ(record.finish_reason, "stop");
  EXPECT_EQ(record.prompt_tokens, Ids(kPrompt).size());
  EXPECT_EQ(record.completion_tokens, answer.size());
  EXPECT_TRUE(record.queue && record.time_to_first_token && record.decode);
  EXPECT_LE(*record.queue, *record.time_to_first_token);
  EXPECT_LE(*record.time_to_first_token + *record.decode, record.total);
  EXPECT_EQ(under_test_.observer().num_first_tokens(), 1);
  EXPECT_EQ(under_test_.observer().num_further_tokens(), answer.size() - 1);
}

}  // namespace
}  // namespace latentd
