#include "server/client/connection.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <csignal>
#include <limits>
#include <sstream>
#include <thread>

#include "google/rpc/error_details.pb.h"
#include "tests/server/client/scripted_server.h"

namespace latentd {
namespace {

using testing::HasSubstr;

TEST(DescribeErrorTest, NamesCodeReasonFieldsAndRetry) {
  google::rpc::ErrorInfo info;
  info.set_reason("BAD_FIELD");
  google::rpc::BadRequest bad;
  auto* violation = bad.add_field_violations();
  violation->set_field("sampling.top_p");
  violation->set_description("2 is not in (0, 1]");
  violation = bad.add_field_violations();
  violation->set_field("limits.max_tokens");
  violation->set_description("-1 is below 1");
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_nanos(500'000'000);
  EXPECT_EQ(DescribeError(StatusWithDetails(grpc::StatusCode::INVALID_ARGUMENT, "two bad fields",
                                            {&info, &bad, &retry})),
            "INVALID_ARGUMENT (BAD_FIELD): two bad fields (sampling.top_p: 2 is not in (0, 1]; "
            "limits.max_tokens: -1 is below 1) (try again in 500ms)");
}

TEST(DescribeErrorTest, DoesNotRepeatWhatTheMessageSays) {
  google::rpc::BadRequest bad;
  auto* violation = bad.add_field_violations();
  violation->set_field("sampling.top_p");
  violation->set_description("2 is not in (0, 1]");
  EXPECT_EQ(DescribeError(StatusWithDetails(grpc::StatusCode::INVALID_ARGUMENT,
                                            "sampling.top_p: 2 is not in (0, 1]", {&bad})),
            "INVALID_ARGUMENT: sampling.top_p: 2 is not in (0, 1]");
}

TEST(DescribeErrorTest, IsOneLineAndSurvivesBrokenDetails) {
  EXPECT_EQ(DescribeError({grpc::StatusCode::INTERNAL, "a\nb\x1b[2J", "\xff\xff not a message"}),
            "INTERNAL: a b^[[2J");
}

TEST(ConnectionOptionsTest, RefusesByNameAndLimit) {
  EXPECT_THAT(ValidateConnectionOptions({.target = ""}).ToString(), HasSubstr("--target"));
  EXPECT_THAT(ValidateConnectionOptions({.wait_s = -1}).ToString(),
              HasSubstr("--wait is -1; it must lie in [0, 86400]"));
  EXPECT_FALSE(
      ValidateConnectionOptions({.wait_s = std::numeric_limits<double>::quiet_NaN()}).ok());
  EXPECT_TRUE(ValidateConnectionOptions({}).ok());
}

class ServerWaitTest : public testing::Test {
 protected:
  std::shared_ptr<grpc::Channel> channel_ = MakeChannel({.target = "127.0.0.1:1"});
  Interrupts interrupts_;
  std::ostringstream err_;
};

TEST_F(ServerWaitTest, WaitsAsTheServerAsks) {
  const ConnectionOptions options;
  ServerWait wait(options, *channel_, interrupts_, err_);
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(wait.TryAgain(LoadingStatus(250)));
  EXPECT_TRUE(wait.TryAgain(LoadingStatus(250)));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(500));
  // The same notice once.
  EXPECT_EQ(err_.str(), "waiting for 127.0.0.1:50051: the model is loading\n");
}

TEST_F(ServerWaitTest, EndsWithTheTime) {
  const ConnectionOptions options = {.wait_s = 0.3};
  ServerWait wait(options, *channel_, interrupts_, err_);
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(wait.TryAgain(LoadingStatus(60'000)));
  EXPECT_FALSE(wait.TryAgain(LoadingStatus(60'000)));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(5));
}

TEST_F(ServerWaitTest, NobodyThereIsFinalUnlessAskedToWait) {
  const grpc::Status refused(grpc::StatusCode::UNAVAILABLE, "connection refused");
  const ConnectionOptions by_default;
  EXPECT_FALSE(ServerWait(by_default, *channel_, interrupts_, err_).TryAgain(refused));
  const ConnectionOptions asked = {.wait_s = 0.3};
  ServerWait wait(asked, *channel_, interrupts_, err_);
  const absl::Time begin = absl::Now();
  EXPECT_FALSE(wait.TryAgain(refused));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(300));
  EXPECT_EQ(err_.str(), "waiting for 127.0.0.1:50051: it does not answer yet\n");
}

TEST_F(ServerWaitTest, NoticesSoonThatAServerHasCome) {
  int port = 0;
  {
    const ScriptedServer first;  // to find a free port
    port = std::stoi(first.target().substr(first.target().find(':') + 1));
  }
  const ConnectionOptions options = {.target = "127.0.0.1:" + std::to_string(port), .wait_s = 60};
  const auto channel = MakeChannel(options);
  const auto stub = v1::InferenceService::NewStub(channel);
  const auto get_model = [&stub] {
    grpc::ClientContext context;
    v1::GetModelResponse response;
    return stub->GetModel(&context, {}, &response);
  };
  const grpc::Status refused = get_model();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE);
  std::unique_ptr<ScriptedServer> server;
  absl::Time started;
  std::thread later([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(300));
    started = absl::Now();
    server = std::make_unique<ScriptedServer>(port);
  });
  ServerWait wait(options, *channel, interrupts_, err_);
  EXPECT_TRUE(wait.TryAgain(refused));
  later.join();
  EXPECT_LT(absl::Now() - started, absl::Seconds(3));
  EXPECT_TRUE(get_model().ok());
}

TEST_F(ServerWaitTest, OtherErrorsAreFinal) {
  const ConnectionOptions options = {.wait_s = 5};
  ServerWait wait(options, *channel_, interrupts_, err_);
  EXPECT_FALSE(wait.TryAgain({grpc::StatusCode::INVALID_ARGUMENT, "no"}));
  EXPECT_FALSE(wait.TryAgain({grpc::StatusCode::RESOURCE_EXHAUSTED, "queue is full"}));
}

TEST_F(ServerWaitTest, CtrlCEndsTheWait) {
  const ConnectionOptions options;
  ServerWait wait(options, *channel_, interrupts_, err_);
  std::thread ctrl_c([] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    std::raise(SIGINT);
  });
  EXPECT_FALSE(wait.TryAgain(LoadingStatus(60'000)));
  ctrl_c.join();
}

}  // namespace
}  // namespace latentd
