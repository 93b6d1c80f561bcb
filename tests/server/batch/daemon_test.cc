// Batch jobs in the whole daemon, in this process: the demo model runs them.

#include <chrono>
#include <filesystem>
#include <memory>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "server/server.h"
#include "tests/server/batch/batch_fixture.h"

namespace latentd {
namespace {

using testing::HasSubstr;

class BatchDaemonTest : public testing::Test {
 protected:
  BatchDaemonTest() {
    config_.listen = "127.0.0.1:0";
    config_.http_listen = "";
    config_.kv_cache_memory = int64_t{64} << 20;
    config_.batch_dir = (folder_.path() / "batch").string();
  }

  absl::Status Start(bool await_load = true) {
    loaded_ = std::make_unique<absl::Notification>();
    auto path = ModelPath::Resolve(config_, std::filesystem::absolute("build/latentd"));
    if (!path.ok()) return path.status();
    auto server = Server::Start(config_, *path, [loaded = loaded_.get()] {
      if (!loaded->HasBeenNotified()) loaded->Notify();
    });
    if (!server.ok()) return server.status();
    server_ = *std::move(server);
    stub_ = v1::BatchService::NewStub(grpc::CreateChannel(
        absl::StrCat("127.0.0.1:", server_->grpc_port()), grpc::InsecureChannelCredentials()));
    if (await_load) loaded_->WaitForNotification();
    return absl::OkStatus();
  }

  Created Create(const std::string& key, int64_t count, int32_t max_tokens) {
    v1::CreateJobRequest items;
    for (int64_t i = 0; i < count; ++i) {
      v1::BatchItem* item = items.mutable_items()->add_items();
      *item = CompletionItem(i);
      item->mutable_complete()->mutable_limits()->set_max_tokens(max_tokens);
      item->mutable_complete()->mutable_limits()->set_ignore_eos(true);
      item->mutable_complete()->mutable_sampling()->set_temperature(0);
    }
    grpc::ClientContext context;
    Created created;
    const auto writer = stub_->CreateJob(&context, &created.response);
    for (const auto& frame : {HeaderFrame(key), items, CommitFrame(count)}) {
      if (!writer->Write(frame)) break;
    }
    writer->WritesDone();
    created.status = writer->Finish();
    return created;
  }
  // Follows it to its end.
  v1::Job Await(const std::string& name) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    v1::WatchJobRequest request;
    request.set_name(name);
    const auto reader = stub_->WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (reader->Read(&response)) {
    }
    const grpc::Status status = reader->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.job();
  }
  std::vector<v1::ItemResult> ResultsOf(const std::string& name) {
    grpc::ClientContext context;
    v1::StreamResultsRequest request;
    request.set_name(name);
    const auto reader = stub_->StreamResults(&context, request);
    v1::StreamResultsResponse response;
    std::vector<v1::ItemResult> results;
    while (reader->Read(&response)) {
      results.insert(results.end(), response.results().begin(), response.results().end());
    }
    EXPECT_TRUE(reader->Finish().ok());
    return results;
  }

  StoreFolder folder_;
  ServeConfig config_;
  std::unique_ptr<absl::Notification> loaded_;
  std::unique_ptr<Server> server_;
  std::unique_ptr<v1::BatchService::Stub> stub_;
};

TEST_F(BatchDaemonTest, AJobRunsAndItsResultsOutliveTheDaemon) {
  ASSERT_EQ(Start(), absl::OkStatus());
  const Created created = Create("key", 20, /*max_tokens=*/5);
  ASSERT_TRUE(created.status.ok()) << created.status.error_message();
  const std::string name = created.response.job().name();
  const v1::Job job = Await(name);
  EXPECT_EQ(job.state(), v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(job.counts().succeeded(), 20);
  EXPECT_EQ(job.completion_tokens(), 100);
  const auto results = ResultsOf(name);
  ASSERT_EQ(results.size(), 20u);
  std::set<std::string> ids;
  for (const v1::ItemResult& result : results) {
    ids.insert(result.custom_id());
    EXPECT_EQ(result.complete().usage().completion_tokens(), 5);
  }
  EXPECT_EQ(ids.size(), 20u);

  stub_.reset();
  server_.reset();
  ASSERT_EQ(Start(/*await_load=*/false), absl::OkStatus());  // answers while it loads
  EXPECT_EQ(ResultsOf(name).size(), 20u);
  loaded_->WaitForNotification();
}

TEST_F(BatchDaemonTest, AStoppedDaemonsJobGoesOn) {
  config_.batch_max_running = 2;
  ASSERT_EQ(Start(), absl::OkStatus());
  const Created created = Create("key", 12, /*max_tokens=*/200);
  ASSERT_TRUE(created.status.ok()) << created.status.error_message();
  const std::string name = created.response.job().name();
  ASSERT_TRUE(Eventually([&] { return !ResultsOf(name).empty(); }));
  server_->StartDrain();
  EXPECT_EQ(Create("other", 1, 1).status.error_code(), grpc::StatusCode::UNAVAILABLE);
  stub_.reset();
  server_.reset();
  ASSERT_EQ(Start(), absl::OkStatus());
  const v1::Job job = Await(name);
  EXPECT_EQ(job.counts().succeeded(), 12);
  EXPECT_EQ(job.recoveries(), 1);
  for (const v1::ItemResult& result : ResultsOf(name)) {
    EXPECT_EQ(result.attempts(), 1) << result.index();  // a drain is nobody's fault
  }
}

TEST_F(BatchDaemonTest, ADirectoryIsOfOneDaemon) {
  ASSERT_EQ(Start(/*await_load=*/false), absl::OkStatus());
  auto path = ModelPath::Resolve(config_, std::filesystem::absolute("build/latentd"));
  const auto second = Server::Start(config_, *path, [] {});
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(std::string(second.status().message()), HasSubstr(config_.batch_dir));
}

TEST_F(BatchDaemonTest, ADirectoryThatCannotBeIsNamed) {
  config_.batch_dir = "/proc/nowhere";
  EXPECT_THAT(std::string(Start().message()), HasSubstr("batch_dir /proc/nowhere"));
}

TEST_F(BatchDaemonTest, WithoutADirectoryThereAreNone) {
  config_.batch_dir = "";
  ASSERT_EQ(Start(), absl::OkStatus());
  EXPECT_EQ(Explain(Create("key", 1, 1).status).reason, "BATCH_DISABLED");
}

}  // namespace
}  // namespace latentd
