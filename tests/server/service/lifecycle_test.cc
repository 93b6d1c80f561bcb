// How a call ends other than well: the client, a deadline, a full queue, a drain, a failing engine;
// and what it leaves behind. Blocks must be free at the next step.

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {
namespace {

constexpr TokenId kEos = 1;

// One sequence runs at a time, long prompts take several steps.
class LifecycleTest : public ServiceTest {
 protected:
  LifecycleTest() : ServiceTest(MakeOptions()) {}

  static ServiceUnderTest::Options MakeOptions() {
    ServiceUnderTest::Options options;
    options.scheduler.max_running = 1;
    options.scheduler.max_waiting = 2;
    options.scheduler.max_step_tokens = 256;
    return options;
  }

  // Lets the running step end and expects that all blocks are free before a further one has begun.
  void ExpectFreeAtNextStep() {
    const int64_t begun = engine_.num_steps();
    engine_.Allow(1);
    EXPECT_TRUE(Eventually([&] {
      const CoreStats stats = under_test_.core().stats();
      return stats.num_free_blocks == stats.num_blocks && stats.num_running == 0 &&
             stats.num_waiting == 0;
    }));
    EXPECT_EQ(engine_.num_steps(), begun);
  }
  bool AwaitIdle() {
    return Eventually([&] { return under_test_.service().num_active() == 0; });
  }
};

// A call of either kind on its own thread, which can be cancelled.
class Caller {
 public:
  Caller(v1::InferenceService::Stub& stub, const v1::ChatRequest& request, bool unary,
         absl::Duration timeout = absl::InfiniteDuration()) {
    if (timeout != absl::InfiniteDuration()) {
      context_.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
    }
    thread_ = std::thread([this, &stub, request, unary] {
      if (unary) {
        v1::ChatResponse response;
        status_ = stub.Chat(&context_, request, &response);
      } else {
        status_ = ReadAll(*stub.StreamChat(&context_, request)).status;
      }
    });
  }
  ~Caller() {
    if (!thread_.joinable()) return;
    Cancel();  // a test has failed: its engine may hold
    Finish();
  }
  void Cancel() { context_.TryCancel(); }
  grpc::Status Finish() {
    thread_.join();
    return status_;
  }

 private:
  grpc::ClientContext context_;
  grpc::Status status_;
  std::thread thread_;
};

v1::ChatRequest LongPrompt() {
  std::string text;
  for (int i = 0; i < 400; ++i) absl::StrAppend(&text, i, " ");
  return UserSays(text);
}

struct EndingParam {
  std::string name;
  bool unary;
  bool by_deadline;
};

class EndingTest : public LifecycleTest, public testing::WithParamInterface<EndingParam> {
 protected:
  std::unique_ptr<Caller> Call(const v1::ChatRequest& request) {
    return std::make_unique<Caller>(
        stub(), request, GetParam().unary,
        GetParam().by_deadline ? absl::Milliseconds(300) : absl::InfiniteDuration());
  }
  // The call goes, or its deadline passes; the server has noticed when this returns.
  void EndCall(Caller* caller) {
    if (!GetParam().by_deadline) caller->Cancel();
    const grpc::Status status = caller->Finish();
    EXPECT_EQ(status.error_code(), GetParam().by_deadline ? grpc::StatusCode::DEADLINE_EXCEEDED
                                                          : grpc::StatusCode::CANCELLED);
  }
  absl::StatusCode expected_code() const {
    return GetParam().by_deadline ? absl::StatusCode::kDeadlineExceeded
                                  : absl::StatusCode::kCancelled;
  }
};

TEST_P(EndingTest, WhileItRuns) {
  engine_.Hold();
  engine_.Allow(3);
  const auto caller = Call(UserSays("Hello?"));
  engine_.AwaitStep(4);  // three tokens are out, the fourth is being computed
  EndCall(caller.get());
  ASSERT_TRUE(AwaitIdle());
  ExpectFreeAtNextStep();
  const RequestRecord record = under_test_.observer().AwaitFinished(1);
  EXPECT_EQ(record.code, expected_code());
  EXPECT_LE(record.completion_tokens, 3);  // those that the output threads had come to
  EXPECT_EQ(record.finish_reason, "");
}

TEST_P(EndingTest, InTheMiddleOfItsPrompt) {
  engine_.Hold();
  engine_.Allow(1);
  const auto caller = Call(LongPrompt());
  engine_.AwaitStep(2);  // the second part of the prompt is being computed
  EndCall(caller.get());
  ASSERT_TRUE(AwaitIdle());
  ExpectFreeAtNextStep();
  EXPECT_EQ(under_test_.observer().AwaitFinished(1).completion_tokens, 0);
}

TEST_P(EndingTest, WhileItWaits) {
  engine_.Hold();
  engine_.Say({kEos});
  Caller running(stub(), UserSays("first"), /*unary=*/true);
  engine_.AwaitStep(1);
  const auto waiting = Call(UserSays("second"));
  ASSERT_TRUE(Eventually([&] { return under_test_.core().stats().num_waiting == 1; }));
  EndCall(waiting.get());
  ASSERT_TRUE(Eventually([&] { return under_test_.service().num_active() == 1; }));
  ExpectFreeAtNextStep();
  EXPECT_TRUE(running.Finish().ok());
  const int64_t steps = engine_.num_steps();
  EXPECT_EQ(steps, 1);  // nothing was computed for the one that had gone
}

INSTANTIATE_TEST_SUITE_P(Lifecycle, EndingTest,
                         testing::Values(EndingParam{"StreamCancelled", false, false},
                                         EndingParam{"StreamDeadline", false, true},
                                         EndingParam{"UnaryCancelled", true, false},
                                         EndingParam{"UnaryDeadline", true, true}),
                         [](const auto& info) { return info.param.name; });

TEST_F(LifecycleTest, QueueTimeout) {
  engine_.Hold();
  engine_.Say({kEos});
  v1::ChatRequest request = UserSays("first");
  request.mutable_serving()->mutable_queue_timeout()->set_nanos(50'000'000);
  Caller running(stub(), request, /*unary=*/true);  // it has begun: the timeout is not for it
  engine_.AwaitStep(1);
  const Streamed waited = StreamChat(stub(), request);
  const Error error = Explain(waited.status);
  EXPECT_EQ(error.code, grpc::StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(error.reason, "QUEUE_TIMEOUT");
  EXPECT_TRUE(waited.events.empty());
  engine_.Release();
  EXPECT_TRUE(running.Finish().ok());
}

TEST_F(LifecycleTest, QueueFull) {
  engine_.Hold();
  engine_.Say({kEos});
  Caller running(stub(), UserSays("first"), true);
  engine_.AwaitStep(1);
  Caller second(stub(), UserSays("second"), true);
  Caller third(stub(), UserSays("third"), true);
  ASSERT_TRUE(Eventually([&] { return under_test_.core().stats().num_waiting == 2; }));
  const Error error = Explain(StreamChat(stub(), UserSays("fourth")).status);
  EXPECT_EQ(error.code, grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(error.reason, "QUEUE_FULL");
  EXPECT_GT(error.retry_seconds.value(), 0);
  EXPECT_THAT(under_test_.observer().rejected(), testing::ElementsAre("QUEUE_FULL"));
  engine_.Release();
  EXPECT_TRUE(running.Finish().ok());
  EXPECT_TRUE(second.Finish().ok());
  EXPECT_TRUE(third.Finish().ok());
}

TEST_F(LifecycleTest, TooManyCalls) {
  ServiceUnderTest::Options options;
  options.service.max_concurrent_requests = 2;
  ScriptedEngine engine(DemoEngineInfo());
  ServiceUnderTest small(&engine, options);
  engine.Hold();
  engine.Say({kEos});
  Caller first(small.stub(), UserSays("first"), false), second(small.stub(), UserSays("2"), false);
  ASSERT_TRUE(Eventually([&] { return small.service().num_active() == 2; }));
  const Error error = Explain(StreamChat(small.stub(), UserSays("third")).status);
  EXPECT_EQ(error.code, grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(error.reason, "TOO_MANY_REQUESTS");
  EXPECT_EQ(error.metadata.at("limit"), "2");
  engine.Release();
  EXPECT_TRUE(first.Finish().ok());
  EXPECT_TRUE(second.Finish().ok());
}

TEST_F(LifecycleTest, PriorityGoesFirst) {
  engine_.Hold();
  engine_.Say({kEos});
  Caller running(stub(), UserSays("first"), true);
  engine_.AwaitStep(1);
  Caller low(stub(), UserSays("low"), true);
  ASSERT_TRUE(Eventually([&] { return under_test_.core().stats().num_waiting == 1; }));
  v1::ChatRequest request = UserSays("high");
  request.mutable_serving()->set_priority(5);
  request.mutable_serving()->set_request_id("high");
  Caller high(stub(), request, true);
  ASSERT_TRUE(Eventually([&] { return under_test_.core().stats().num_waiting == 2; }));
  engine_.Allow(2);
  EXPECT_TRUE(running.Finish().ok());
  EXPECT_TRUE(high.Finish().ok());  // while the other still waits
  engine_.Release();
  EXPECT_TRUE(low.Finish().ok());
}

TEST_F(LifecycleTest, DrainLetsStreamsFinishAndRefusesNewOnes) {
  engine_.Hold();
  Caller running(stub(), UserSays("first"), false);
  engine_.AwaitStep(1);
  under_test_.service().StartDrain();
  const Error error = Explain(StreamChat(stub(), UserSays("second")).status);
  EXPECT_EQ(error.code, grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(error.reason, "DRAINING");
  grpc::ClientContext context;
  v1::TokenizeResponse response;
  EXPECT_EQ(Explain(stub().Tokenize(&context, {}, &response)).reason, "DRAINING");
  // A refused call is done with a moment after its client has the answer.
  EXPECT_TRUE(Eventually([&] { return under_test_.service().num_active() == 1; }));
  engine_.Say({kEos});
  engine_.Release();
  EXPECT_TRUE(running.Finish().ok());
  EXPECT_TRUE(AwaitIdle());
}

TEST_F(LifecycleTest, AbortAllEndsEveryCall) {
  engine_.Hold();
  Caller stream(stub(), UserSays("first"), false), unary(stub(), UserSays("second"), true);
  engine_.AwaitStep(1);
  ASSERT_TRUE(Eventually([&] { return under_test_.core().stats().num_waiting == 1; }));
  under_test_.service().AbortAll(absl::UnavailableError("the drain took too long"));
  for (Caller* caller : {&stream, &unary}) {
    const Error error = Explain(caller->Finish());
    EXPECT_EQ(error.code, grpc::StatusCode::UNAVAILABLE);
    EXPECT_EQ(error.message, "the drain took too long");
    EXPECT_EQ(error.reason, "UNAVAILABLE");
  }
  EXPECT_TRUE(AwaitIdle());
  ExpectFreeAtNextStep();
}

TEST_F(LifecycleTest, LoadingIsUnavailable) {
  ServiceUnderTest::Options options;
  options.load = false;
  ScriptedEngine engine(DemoEngineInfo());
  engine.Say({kEos});
  ServiceUnderTest loading(&engine, options);
  const Error error = Explain(StreamChat(loading.stub(), UserSays("Hello?")).status);
  EXPECT_EQ(error.code, grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(error.reason, "LOADING");
  grpc::ClientContext list_context, get_context;
  v1::ListModelsResponse models;
  EXPECT_TRUE(loading.stub().ListModels(&list_context, {}, &models).ok());
  EXPECT_EQ(models.models_size(), 0);
  v1::GetModelResponse model;
  EXPECT_EQ(Explain(loading.stub().GetModel(&get_context, {}, &model)).reason, "LOADING");
  loading.Load();
  EXPECT_TRUE(StreamChat(loading.stub(), UserSays("Hello?")).status.ok());
}

TEST_F(LifecycleTest, AFailingStepEndsTheStreamWithItsStatus) {
  engine_.Hold();
  engine_.Allow(2);
  grpc::ClientContext context;
  const auto reader = stub().StreamChat(&context, UserSays("Hello?"));
  engine_.AwaitStep(3);
  engine_.Fail(absl::UnavailableError("rank 3 is lost"));
  engine_.Release();
  const Streamed streamed = ReadAll(*reader);
  const Error error = Explain(streamed.status);
  EXPECT_EQ(error.code, grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(error.message, testing::HasSubstr("rank 3 is lost"));
  EXPECT_FALSE(streamed.events.empty());
  EXPECT_FALSE(streamed.events.back().has_usage());
  engine_.Say({kEos});
  EXPECT_TRUE(StreamChat(stub(), UserSays("Hello?")).status.ok());  // and life goes on
}

TEST_F(LifecycleTest, TheCoreStopsUnderAStream) {
  engine_.Hold();
  Caller caller(stub(), UserSays("Hello?"), false);
  engine_.AwaitStep(1);
  engine_.Release();
  under_test_.core().Stop();
  EXPECT_EQ(Explain(caller.Finish()).code, grpc::StatusCode::UNAVAILABLE);
  const Error refused = Explain(StreamChat(stub(), UserSays("Hello?")).status);
  EXPECT_EQ(refused.reason, "STOPPED");
}

}  // namespace
}  // namespace latentd
