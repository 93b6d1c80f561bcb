#ifndef LATENTD_TESTS_SERVER_BATCH_BATCH_FIXTURE_H_
#define LATENTD_TESTS_SERVER_BATCH_BATCH_FIXTURE_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "latentd/v1/batch.grpc.pb.h"
#include "server/batch/batch_service.h"
#include "server/batch/batch_store.h"
#include "server/batch/change_hub.h"
#include "tests/server/batch/store_fixture.h"
#include "tests/server/service/service_fixture.h"

namespace latentd {

// Completion item `index` of a job: custom_id "item-<index>".
v1::BatchItem CompletionItem(int64_t index);
std::vector<v1::BatchItem> CompletionItems(int64_t count, int64_t first = 0);
// Commit.sha256 of these.
std::string ChainOf(const std::vector<v1::BatchItem>& items);

// Frames of an upload.
v1::CreateJobRequest HeaderFrame(const std::string& request_id, int64_t first_item = 0);
v1::CreateJobRequest ItemsFrame(const std::vector<v1::BatchItem>& items);
v1::CreateJobRequest CommitFrame(int64_t item_count, const std::string& sha256 = "");

// How a call of CreateJob went.
struct Created {
  grpc::Status status;
  v1::CreateJobResponse response;
};

// BatchService over real gRPC and a real store, in this process, and a client of it. Nothing runs
// the items: tests end them in the store.
class BatchTest : public testing::Test {
 protected:
  // `vfs`: the store's; empty: SQLite's default.
  explicit BatchTest(BatchServiceOptions options = {}, bool load = true, std::string vfs = "");
  ~BatchTest() override;

  // Ends the server and the store, and begins again in the same directory.
  void Restart();
  void Start();
  void Stop();

  v1::BatchService::Stub& stub() { return *stub_; }
  BatchStore& store() { return *store_; }
  BatchService& service() { return *service_; }
  std::shared_ptr<grpc::Channel> NewChannel(grpc::ChannelArguments arguments = {});

  Created Send(const std::vector<v1::CreateJobRequest>& frames, const std::string& owner = "");
  // A job of `count` items; fails the test unless it is created.
  v1::Job Create(const std::string& request_id, int64_t count, const std::string& owner = "");
  v1::Job Get(const std::string& name);
  JobId IdOf(const std::string& name) { return store().GetJob(name)->id; }

  // Runs items [first, first + count) as an engine would: they succeed, those of `failed` fail.
  void EndItems(const std::string& name, int64_t first, int64_t count,
                const std::vector<int64_t>& failed = {});
  // The same, and brings the job to its end.
  void EndJob(const std::string& name, int64_t count, const std::vector<int64_t>& failed = {});
  void Finalize(const std::string& name);

  BatchServiceOptions options_;
  const bool load_;
  const std::string vfs_;
  StoreFolder folder_;
  std::unique_ptr<ChangeHub> hub_;
  std::unique_ptr<BatchStore> store_;
  std::unique_ptr<BatchService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::unique_ptr<v1::BatchService::Stub> stub_;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BATCH_BATCH_FIXTURE_H_
