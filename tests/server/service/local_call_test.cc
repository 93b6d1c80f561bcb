// Calls of this process: as those of a client, but in the background of these.

#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <variant>

#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "google/protobuf/util/message_differencer.h"
#include "server/local_caller.h"
#include "server/status.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

constexpr TokenId kEos = 1;

class LocalCallTest : public ServiceTest {
 protected:
  LocalCallTest() : ServiceTest(MakeOptions()) {}

  static ServiceUnderTest::Options MakeOptions() {
    ServiceUnderTest::Options options;
    options.scheduler.max_running = 1;
    options.service.max_concurrent_requests = 1;
    return options;
  }

  // A call on its way, and how it ended.
  struct Call {
    absl::Notification ended;
    absl::StatusOr<LocalResponse> response = absl::UnknownError("not ended");

    const absl::StatusOr<LocalResponse>& Await() {
      EXPECT_TRUE(ended.WaitForNotificationWithTimeout(absl::Seconds(30)));
      return response;
    }
  };

  LocalCaller& caller() { return *under_test_.service().local_caller(); }

  std::unique_ptr<Call> Start(LocalCaller::CallId id, LocalRequest request,
                              const LocalCaller::Options& options = {}) {
    auto call = std::make_unique<Call>();
    caller().Start(id, std::move(request), options,
                   [call = call.get()](absl::StatusOr<LocalResponse> response) {
                     EXPECT_FALSE(call->ended.HasBeenNotified());
                     call->response = std::move(response);
                     call->ended.Notify();
                   });
    return call;
  }

  bool AwaitFree() {
    return Eventually([&] {
      const CoreStats stats = under_test_.core().stats();
      return stats.num_free_blocks == stats.num_blocks && stats.num_background_running == 0 &&
             stats.num_background_waiting == 0;
    });
  }
};

v1::ChatRequest Question() {
  v1::ChatRequest request = UserSays("Why?");
  request.mutable_serving()->set_request_id("mine");
  request.mutable_outputs()->set_token_ids(true);
  return request;
}

TEST_F(LocalCallTest, AnswersAsTheClientsCallDoes) {
  v1::ChatRequest request = Question();
  request.mutable_sampling()->set_seed(7);
  std::vector<TokenId> script = Ids("Because <think> no.");
  script.push_back(kEos);
  engine_.Say(script);
  v1::ChatResponse expected;
  grpc::ClientContext context;
  ASSERT_TRUE(stub().Chat(&context, request, &expected).ok());

  engine_.Say(script);
  const auto call = Start(1, request, {.seed = 8});
  ASSERT_TRUE(call->Await().ok()) << call->response.status();
  v1::ChatResponse response = std::get<v1::ChatResponse>(*call->response);
  EXPECT_FALSE(response.choices(0).message().content().empty());
  response.mutable_usage()->clear_timings();
  response.mutable_usage()->clear_cached_tokens();
  expected.mutable_usage()->clear_timings();
  expected.mutable_usage()->clear_cached_tokens();
  EXPECT_TRUE(google::protobuf::util::MessageDifferencer::Equals(response, expected))
      << response.DebugString() << expected.DebugString();
}

TEST_F(LocalCallTest, CompletesAndTakesTheSeedThatItIsGiven) {
  v1::CompleteRequest request;
  request.set_text("Once");
  engine_.Say({kEos});
  const auto call = Start(1, request, {.seed = 12345});
  ASSERT_TRUE(call->Await().ok()) << call->response.status();
  EXPECT_EQ(std::get<v1::CompleteResponse>(*call->response).seed(), 12345u);
}

TEST_F(LocalCallTest, IsRefusedAsTheClientsCallIs) {
  v1::ChatRequest request = Question();
  request.mutable_sampling()->set_top_p(1.5);
  v1::ChatResponse response;
  grpc::ClientContext context;
  const Error expected = Explain(stub().Chat(&context, request, &response));
  const auto call = Start(1, request);
  const Error error = Explain(ToGrpcStatus(call->Await().status()));
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(error.code, expected.code);
  EXPECT_EQ(error.reason, expected.reason);
  EXPECT_EQ(error.violations, expected.violations);
}

TEST_F(LocalCallTest, GivesItsSeatToAClientAndCountsAgainstNoneOfItsLimits) {
  engine_.Hold();
  const auto call = Start(1, Question());
  engine_.AwaitStep(1);
  EXPECT_EQ(under_test_.service().num_active(), 0);
  Streamed streamed;
  std::thread client([&] { streamed = StreamChat(stub(), UserSays("me first")); });
  EXPECT_TRUE(Eventually([&] { return under_test_.core().stats().num_waiting == 1; }));
  engine_.Allow(1);
  engine_.AwaitStep(2);
  CoreStats stats = under_test_.core().stats();
  EXPECT_EQ(stats.num_running, 1);
  EXPECT_EQ(stats.num_background_running, 0);
  EXPECT_EQ(stats.num_background_waiting, 1);
  engine_.Say({kEos});
  engine_.Say({kEos});
  engine_.Release();
  client.join();
  EXPECT_TRUE(streamed.status.ok()) << streamed.status.error_message();
  EXPECT_TRUE(call->Await().ok()) << call->response.status();
}

TEST_F(LocalCallTest, TheObserverHearsNothing) {
  engine_.Say({5, 6, kEos});
  const auto call = Start(1, Question());
  ASSERT_TRUE(call->Await().ok());
  v1::ChatRequest bad = Question();
  bad.mutable_sampling()->set_top_p(2);
  EXPECT_FALSE(Start(2, bad)->Await().ok());
  engine_.Say({kEos});
  EXPECT_TRUE(StreamChat(stub(), UserSays("hello")).status.ok());
  under_test_.observer().AwaitFinished(1);
  EXPECT_EQ(under_test_.observer().num_first_tokens(), 1);
  EXPECT_EQ(under_test_.observer().num_further_tokens(), 0);
  EXPECT_THAT(under_test_.observer().rejected(), testing::IsEmpty());
}

TEST_F(LocalCallTest, CancelEndsItOnce) {
  engine_.Hold();
  const auto running = Start(1, Question()), waiting = Start(2, Question());
  engine_.AwaitStep(1);
  for (int id = 1; id <= 2; ++id) caller().Cancel(id);
  for (Call* call : {running.get(), waiting.get()}) {
    EXPECT_EQ(call->Await().status().code(), absl::StatusCode::kCancelled);
    EXPECT_EQ(ErrorReason(call->response.status()), "CANCELLED");
  }
  caller().Cancel(1);
  engine_.Release();
  EXPECT_TRUE(AwaitFree());
}

TEST_F(LocalCallTest, AbortAllEndsItToo) {
  engine_.Hold();
  const auto call = Start(1, Question());
  engine_.AwaitStep(1);
  under_test_.service().AbortAll(absl::UnavailableError("over"));
  EXPECT_EQ(call->Await().status().message(), "over");
  engine_.Release();
  EXPECT_TRUE(AwaitFree());
}

TEST_F(LocalCallTest, ADrainTakesNone) {
  EXPECT_EQ(caller().capacity(), 1);
  under_test_.service().StartDrain();
  EXPECT_EQ(caller().capacity(), 0);
  EXPECT_EQ(ErrorReason(Start(1, Question())->Await().status()), "DRAINING");
}

TEST_F(LocalCallTest, AFailedStepIsToldFromAnEngineThatIsGone) {
  engine_.Hold();
  const auto in_step = Start(1, Question()), waiting = Start(2, Question());
  engine_.AwaitStep(1);
  EXPECT_TRUE(Eventually([&] { return under_test_.core().stats().num_background_waiting == 1; }));
  engine_.Fail(absl::InternalError("burnt"));
  engine_.Allow(1);
  EXPECT_EQ(ErrorReason(in_step->Await().status()), "ENGINE_FAILED");
  engine_.AwaitStep(2);  // the other's
  const auto never = Start(3, Question());
  EXPECT_TRUE(Eventually([&] { return under_test_.core().stats().num_background_waiting == 1; }));
  std::thread stop([&] { under_test_.core().Stop(); });
  engine_.Release();
  stop.join();
  EXPECT_EQ(ErrorReason(never->Await().status()), "ENGINE_UNAVAILABLE");
  EXPECT_EQ(ErrorReason(waiting->Await().status()), "ENGINE_UNAVAILABLE");
}

}  // namespace
}  // namespace latentd
