#include "server/health.h"

#include <grpcpp/grpcpp.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace latentd {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using grpc::health::v1::HealthListRequest;
using grpc::health::v1::HealthListResponse;

constexpr char kService[] = "latentd.v1.InferenceService";

// The service behind a real gRPC server, and a client of it.
class HealthTest : public ::testing::Test {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    builder.RegisterService(&health_);
    server_ = builder.BuildAndStart();
    stub_ = Health::NewStub(server_->InProcessChannel({}));
  }
  void TearDown() override {
    health_.EndWatches();
    server_->Shutdown();
  }

  static HealthCheckRequest Request(const std::string& service) {
    HealthCheckRequest request;
    request.set_service(service);
    return request;
  }

  // The status, or -1 for NOT_FOUND.
  int Check(const std::string& service) {
    grpc::ClientContext context;
    HealthCheckResponse response;
    const grpc::Status status = stub_->Check(&context, Request(service), &response);
    if (status.error_code() == grpc::StatusCode::NOT_FOUND) return -1;
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.status();
  }

  struct Watch {
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<HealthCheckResponse>> reader;
    // The next status; -1 when the stream has ended.
    int Next() {
      HealthCheckResponse response;
      return reader->Read(&response) ? response.status() : -1;
    }
  };
  std::unique_ptr<Watch> StartWatch(const std::string& service) {
    auto watch = std::make_unique<Watch>();
    watch->context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    watch->reader = stub_->Watch(&watch->context, Request(service));
    return watch;
  }

  HealthService health_{{kService}};
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Health::Stub> stub_;
};

TEST_F(HealthTest, ALoadingServerIsAliveAndNotReady) {
  EXPECT_EQ(Check(""), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check(kService), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check("liveness"), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check("liveness2"), -1);
}

TEST_F(HealthTest, TheTwoFactsAreIndependent) {
  health_.SetReady(true);
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);
  EXPECT_EQ(Check(kService), HealthCheckResponse::SERVING);
  health_.SetAlive(false);
  EXPECT_EQ(Check("liveness"), HealthCheckResponse::NOT_SERVING);
  EXPECT_EQ(Check(""), HealthCheckResponse::SERVING);
}

TEST_F(HealthTest, ListTellsEveryKey) {
  health_.SetReady(true);
  grpc::ClientContext context;
  HealthListResponse response;
  ASSERT_TRUE(stub_->List(&context, HealthListRequest(), &response).ok());
  ASSERT_EQ(response.statuses_size(), 3);
  for (const char* key : {"", kService, "liveness"}) {
    EXPECT_EQ(response.statuses().at(key).status(), HealthCheckResponse::SERVING) << key;
  }
}

TEST_F(HealthTest, AWatchIsToldEachChangeAndNothingElse) {
  const auto watch = StartWatch("");
  EXPECT_EQ(watch->Next(), HealthCheckResponse::NOT_SERVING);
  health_.SetAlive(false);  // another key
  health_.SetReady(false);  // no change
  health_.SetReady(true);
  EXPECT_EQ(watch->Next(), HealthCheckResponse::SERVING);
  health_.SetReady(false);
  EXPECT_EQ(watch->Next(), HealthCheckResponse::NOT_SERVING);
  health_.EndWatches();
  EXPECT_EQ(watch->Next(), -1);
  EXPECT_EQ(watch->reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(HealthTest, AWatchOfAnUnknownServiceStaysOpen) {
  const auto watch = StartWatch("nothing");
  EXPECT_EQ(watch->Next(), HealthCheckResponse::SERVICE_UNKNOWN);
  health_.SetReady(true);
  watch->context.TryCancel();
  EXPECT_EQ(watch->Next(), -1);
  EXPECT_EQ(watch->reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(HealthTest, AWatchAfterTheEndEndsAtOnce) {
  health_.EndWatches();
  const auto watch = StartWatch("");
  EXPECT_EQ(watch->Next(), -1);
  EXPECT_EQ(watch->reader->Finish().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST_F(HealthTest, OpenWatchesDoNotHoldUpTheShutdown) {
  std::vector<std::unique_ptr<Watch>> watches;
  for (int i = 0; i < 20; ++i) {
    watches.push_back(StartWatch(i % 2 == 0 ? "" : "liveness"));
    EXPECT_NE(watches.back()->Next(), -1);
  }
  const auto begin = std::chrono::steady_clock::now();
  health_.EndWatches();
  server_->Shutdown(std::chrono::system_clock::now() + std::chrono::seconds(20));
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(10));
}

// Changes, cancels and the end at the same time: for the sanitizers, and nothing may hang.
TEST_F(HealthTest, WatchersComeAndGoWhileTheStateChanges) {
  std::thread changes([this] {
    for (int i = 0; i < 500; ++i) health_.SetReady(i % 2 == 0);
    health_.SetReady(true);
  });
  std::vector<std::thread> clients;
  for (int i = 0; i < 4; ++i) {
    clients.emplace_back([this, i] {
      for (int n = 0; n < 20; ++n) {
        const auto watch = StartWatch("");
        EXPECT_NE(watch->Next(), -1);
        if ((n + i) % 2 == 0) watch->Next();
        watch->context.TryCancel();
        while (watch->Next() != -1) {
        }
        watch->reader->Finish();
      }
    });
  }
  changes.join();
  // A client that waits for one more change needs one.
  std::atomic<bool> done{false};
  std::thread toggles([this, &done] {
    for (int i = 0; !done; ++i) {
      health_.SetReady(i % 2 == 0);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  for (std::thread& client : clients) client.join();
  done = true;
  toggles.join();
}

}  // namespace
}  // namespace latentd
