#include "server/server.h"

#include <grpcpp/grpcpp.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"
#include "latentd/v1/inference.grpc.pb.h"
#include "server/log.h"
#include "server/status.h"

namespace latentd {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ::testing::HasSubstr;

// The whole daemon in this process, on the demo model and free ports.
class ServerTest : public ::testing::Test {
 protected:
  ServerTest() {
    config_.listen = "127.0.0.1:0";
    config_.http_listen = "127.0.0.1:0";
    config_.kv_cache_memory = int64_t{64} << 20;
  }

  absl::Status Start() {
    auto path = ModelPath::Resolve(config_, std::filesystem::absolute("build/latentd"));
    if (!path.ok()) return path.status();
    auto server = Server::Start(config_, *path, [this] {
      if (!loaded_.HasBeenNotified()) loaded_.Notify();
    });
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    channel_ = grpc::CreateChannel("127.0.0.1:" + std::to_string(server_->grpc_port()),
                                   grpc::InsecureChannelCredentials());
    health_ = Health::NewStub(channel_);
    inference_ = v1::InferenceService::NewStub(channel_);
    return absl::OkStatus();
  }

  HealthCheckResponse::ServingStatus Check(const std::string& service) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    context.set_wait_for_ready(true);
    HealthCheckRequest request;
    request.set_service(service);
    HealthCheckResponse response;
    EXPECT_TRUE(health_->Check(&context, request, &response).ok());
    return response.status();
  }

  static v1::ChatRequest Question() {
    v1::ChatRequest request;
    auto* message = request.add_messages();
    message->set_role(v1::ROLE_USER);
    message->set_content("What is MLA?");
    request.mutable_sampling()->set_temperature(0);
    return request;
  }
  grpc::Status Ask(v1::ChatResponse* response) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    return inference_->Chat(&context, Question(), response);
  }

  ServeConfig config_;
  absl::Notification loaded_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<Health::Stub> health_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
};

TEST_F(ServerTest, LoadsServesDrainsAndStops) {
  ASSERT_TRUE(Start().ok());
  EXPECT_EQ(Check("liveness"), HealthCheckResponse::SERVING);
  loaded_.WaitForNotification();
  ASSERT_TRUE(server_->load_status()->ok()) << *server_->load_status();
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);

  v1::ChatResponse response;
  const grpc::Status status = Ask(&response);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(response.choices_size(), 1);
  EXPECT_THAT(response.choices(0).message().content(), HasSubstr("multi-head latent attention"));
  EXPECT_EQ(response.model(), "demo-model");

  // A stream that is under way when the drain begins ends by itself.
  grpc::ClientContext context;
  auto stream = inference_->StreamChat(&context, Question());
  v1::GenerationEvent event;
  ASSERT_TRUE(stream->Read(&event));
  server_->StartDrain();
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check("liveness"), HealthCheckResponse::SERVING);
  const grpc::Status refused = Ask(&response);
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(ErrorReason(FromGrpcStatus(refused)), "DRAINING");
  bool usage = false;
  while (stream->Read(&event)) usage = usage || event.has_usage();
  EXPECT_TRUE(stream->Finish().ok());
  EXPECT_TRUE(usage);

  const absl::Time begin = absl::Now();
  server_->Stop(absl::Seconds(20));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(10));
}

TEST_F(ServerTest, CallsThatOutlastTheDrainAreCutOff) {
  ASSERT_TRUE(Start().ok());
  loaded_.WaitForNotification();
  v1::ChatRequest request = Question();
  request.mutable_limits()->set_ignore_eos(true);
  grpc::ClientContext context;
  auto stream = inference_->StreamChat(&context, request);
  v1::GenerationEvent event;
  ASSERT_TRUE(stream->Read(&event));
  server_->StartDrain();
  EXPECT_EQ(server_->num_active(), 1);
  server_->CutCalls(WithRetryDelay(
      MakeError(absl::StatusCode::kUnavailable, "DRAINING", "the server is shutting down"),
      absl::Seconds(1)));
  while (stream->Read(&event)) {
  }
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(ServerTest, StoppedWhileLoading) {
  config_.load_format = "dummy";
  ASSERT_TRUE(Start().ok());
  server_->Stop(absl::ZeroDuration());
  server_.reset();
  EXPECT_TRUE(loaded_.HasBeenNotified());
}

TEST_F(ServerTest, AModelThatCannotBeLoadedIsAStatusAndThePortsStayHonest) {
  config_.chat_template = "no/such/template.jinja";
  ASSERT_TRUE(Start().ok());
  loaded_.WaitForNotification();
  ASSERT_TRUE(server_->load_status().has_value());
  EXPECT_THAT(std::string(server_->load_status()->message()), HasSubstr("no/such/template.jinja"));
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
}

TEST_F(ServerTest, APortInUseIsNamed) {
  ASSERT_TRUE(Start().ok());
  ServeConfig second = config_;
  second.listen = "127.0.0.1:" + std::to_string(server_->grpc_port());
  const auto path = ModelPath::Resolve(second, std::filesystem::absolute("build/latentd"));
  const auto grpc_clash = Server::Start(second, *path, nullptr);
  EXPECT_THAT(std::string(grpc_clash.status().message()), HasSubstr(second.listen));
  second.listen = "127.0.0.1:0";
  second.http_listen = "127.0.0.1:" + std::to_string(server_->http_port());
  const auto http_clash = Server::Start(second, *path, nullptr);
  EXPECT_THAT(std::string(http_clash.status().message()), HasSubstr(second.http_listen));
  loaded_.WaitForNotification();
}

}  // namespace
}  // namespace latentd
