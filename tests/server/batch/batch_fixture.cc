#include "tests/server/batch/batch_fixture.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/batch/item_chain.h"

namespace latentd {

v1::BatchItem CompletionItem(int64_t index) {
  v1::BatchItem item;
  item.set_custom_id(absl::StrCat("item-", index));
  item.mutable_complete()->set_text(absl::StrCat("Say ", index));
  return item;
}

std::vector<v1::BatchItem> CompletionItems(int64_t count, int64_t first) {
  std::vector<v1::BatchItem> items;
  for (int64_t i = 0; i < count; ++i) items.push_back(CompletionItem(first + i));
  return items;
}

std::string ChainOf(const std::vector<v1::BatchItem>& items) {
  ItemChain chain;
  for (const v1::BatchItem& item : items) chain.Add(item.SerializeAsString());
  return chain.value();
}

v1::CreateJobRequest HeaderFrame(const std::string& request_id, int64_t first_item) {
  v1::CreateJobRequest frame;
  frame.mutable_header()->set_request_id(request_id);
  frame.mutable_header()->set_first_item(first_item);
  return frame;
}

v1::CreateJobRequest ItemsFrame(const std::vector<v1::BatchItem>& items) {
  v1::CreateJobRequest frame;
  for (const v1::BatchItem& item : items) *frame.mutable_items()->add_items() = item;
  return frame;
}

v1::CreateJobRequest CommitFrame(int64_t item_count, const std::string& sha256) {
  v1::CreateJobRequest frame;
  frame.mutable_commit()->set_item_count(item_count);
  frame.mutable_commit()->set_sha256(sha256);
  return frame;
}

// ---- BatchTest ---------------------------------------------------------------------------------

BatchTest::BatchTest(BatchServiceOptions options, bool load, std::string vfs)
    : options_(std::move(options)), load_(load), vfs_(std::move(vfs)) {
  Start();
}

BatchTest::~BatchTest() { Stop(); }

void BatchTest::Start() {
  hub_ = std::make_unique<ChangeHub>();
  auto store = BatchStore::Open(
      {.directory = folder_.path(),
       .vfs = vfs_,
       .on_change = [hub = hub_.get()](const std::vector<JobId>& jobs) { hub->Notify(jobs); }});
  ASSERT_TRUE(store.ok()) << store.status();
  store_ = *std::move(store);
  service_ = std::make_unique<BatchService>(options_, store_.get(), hub_.get());
  if (load_) service_->SetServing(DemoModel());
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(service_->grpc_service());
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
  stub_ = v1::BatchService::NewStub(NewChannel());
}

void BatchTest::Stop() {
  stub_.reset();
  if (server_ != nullptr) server_->Shutdown(std::chrono::system_clock::now());
  server_.reset();
  service_.reset();
  store_.reset();
  hub_.reset();
}

void BatchTest::Restart() {
  Stop();
  Start();
}

std::shared_ptr<grpc::Channel> BatchTest::NewChannel(grpc::ChannelArguments arguments) {
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
  return grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments);
}

Created BatchTest::Send(const std::vector<v1::CreateJobRequest>& frames, const std::string& owner) {
  grpc::ClientContext context;
  if (!owner.empty()) context.AddMetadata("latentd-owner", owner);
  Created created;
  const auto writer = stub().CreateJob(&context, &created.response);
  for (const v1::CreateJobRequest& frame : frames) {
    if (!writer->Write(frame)) break;
  }
  writer->WritesDone();
  created.status = writer->Finish();
  return created;
}

v1::Job BatchTest::Create(const std::string& request_id, int64_t count, const std::string& owner) {
  const Created created = Send(
      {HeaderFrame(request_id), ItemsFrame(CompletionItems(count)), CommitFrame(count)}, owner);
  EXPECT_TRUE(created.status.ok()) << created.status.error_message();
  return created.response.job();
}

v1::Job BatchTest::Get(const std::string& name) {
  grpc::ClientContext context;
  v1::GetJobRequest request;
  request.set_name(name);
  v1::GetJobResponse response;
  const grpc::Status status = stub().GetJob(&context, request, &response);
  EXPECT_TRUE(status.ok()) << status.error_message();
  return response.job();
}

void BatchTest::EndItems(const std::string& name, int64_t first, int64_t count,
                         const std::vector<int64_t>& failed) {
  const JobId job = IdOf(name);
  std::vector<ItemStart> starts;
  std::vector<ItemEnd> ends;
  for (int64_t index = first; index < first + count; ++index) {
    starts.push_back({.job = job, .index = index, .seed = static_cast<uint64_t>(index) + 1});
    const bool fails = std::find(failed.begin(), failed.end(), index) != failed.end();
    ends.push_back(fails ? latentd::Fail(job, index) : latentd::Succeed(job, index));
  }
  EXPECT_EQ(latentd::Start(&store(), std::move(starts)), absl::OkStatus());
  EXPECT_EQ(latentd::End(&store(), std::move(ends)), absl::OkStatus());
}

void BatchTest::EndJob(const std::string& name, int64_t count, const std::vector<int64_t>& failed) {
  EndItems(name, 0, count, failed);
  Finalize(name);
}

void BatchTest::Finalize(const std::string& name) {
  const auto all = store().FinalizeSome(IdOf(name), 1'000'000);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_TRUE(*all);
}

}  // namespace latentd
