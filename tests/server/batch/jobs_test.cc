// BatchService's unary methods: what they give, what they refuse.

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "server/batch/batch_owner.h"
#include "server/batch/opaque_token.h"
#include "tests/server/batch/batch_fixture.h"

namespace latentd {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

class JobsTest : public BatchTest {
 protected:
  using BatchTest::BatchTest;

  template <typename Response, typename Request>
  grpc::Status Call(grpc::Status (v1::BatchService::Stub::*method)(grpc::ClientContext*,
                                                                   const Request&, Response*),
                    const Request& request, Response* response, const std::string& owner = "") {
    grpc::ClientContext context;
    if (!owner.empty()) context.AddMetadata("latentd-owner", owner);
    return (stub().*method)(&context, request, response);
  }

  grpc::Status List(const v1::ListJobsRequest& request, v1::ListJobsResponse* response,
                    const std::string& owner = "") {
    return Call(&v1::BatchService::Stub::ListJobs, request, response, owner);
  }
  // The keys of the page, in order.
  std::vector<std::string> Keys(const v1::ListJobsRequest& request, const std::string& owner = "") {
    v1::ListJobsResponse response;
    const grpc::Status status = List(request, &response, owner);
    EXPECT_TRUE(status.ok()) << status.error_message();
    std::vector<std::string> keys;
    for (const v1::Job& job : response.jobs()) keys.push_back(job.request_id());
    return keys;
  }
  grpc::Status Cancel(const std::string& name, v1::Job* job) {
    v1::CancelJobRequest request;
    request.set_name(name);
    v1::CancelJobResponse response;
    const grpc::Status status = Call(&v1::BatchService::Stub::CancelJob, request, &response);
    *job = response.job();
    return status;
  }
  grpc::Status Delete(const std::string& name, const std::string& etag = "") {
    v1::DeleteJobRequest request;
    request.set_name(name);
    request.set_etag(etag);
    v1::DeleteJobResponse response;
    return Call(&v1::BatchService::Stub::DeleteJob, request, &response);
  }
  grpc::Status Retry(const std::string& name, const std::string& key,
                     v1::RetryJobResponse* response) {
    v1::RetryJobRequest request;
    request.set_name(name);
    request.set_request_id(key);
    return Call(&v1::BatchService::Stub::RetryJob, request, response);
  }
};

TEST_F(JobsTest, AnUnknownJobIsNotFoundByAllMethods) {
  v1::Job job;
  v1::RetryJobResponse retried;
  for (const std::string name : {"jobs/00000000000000000000000000000000", "x"}) {
    v1::GetJobRequest get;
    get.set_name(name);
    v1::GetJobResponse got;
    for (const grpc::Status& status :
         {Call(&v1::BatchService::Stub::GetJob, get, &got), Cancel(name, &job), Delete(name),
          Retry(name, "key", &retried)}) {
      const Error error = Explain(status);
      EXPECT_EQ(error.code, grpc::StatusCode::NOT_FOUND);
      EXPECT_EQ(error.reason, "JOB_NOT_FOUND");
    }
  }
  EXPECT_EQ(Explain(Cancel("", &job)).violations.at("name"), "is not set");
  EXPECT_EQ(Explain(Delete("")).violations.at("name"), "is not set");
}

TEST_F(JobsTest, WhatRunsIsCountedAsRunning) {
  const v1::Job job = Create("key", 10);
  EndItems(job.name(), 0, 2);
  service().SetNumRunning([](JobId) { return 3; });
  v1::JobCounts counts = Get(job.name()).counts();
  EXPECT_EQ(counts.succeeded(), 2);
  EXPECT_EQ(counts.running(), 3);
  EXPECT_EQ(counts.pending(), 5);
  EndItems(job.name(), 2, 8);
  Finalize(job.name());
  counts = Get(job.name()).counts();
  EXPECT_EQ(counts.running(), 0);
  EXPECT_EQ(counts.pending(), 0);
}

TEST_F(JobsTest, ListsPageByPageNewestFirst) {
  for (int i = 0; i < 5; ++i) Create(absl::StrCat("key-", i), 1);
  Send({HeaderFrame("upload"), ItemsFrame(CompletionItems(1))});  // is no job yet
  Create("others", 1, "another");
  v1::ListJobsRequest request;
  EXPECT_THAT(Keys(request), ElementsAre("key-4", "key-3", "key-2", "key-1", "key-0"));
  EXPECT_THAT(Keys(request, "another"), ElementsAre("others"));

  request.set_page_size(2);
  std::vector<std::string> keys;
  std::vector<int> sizes;
  do {
    v1::ListJobsResponse response;
    ASSERT_TRUE(List(request, &response).ok());
    for (const v1::Job& job : response.jobs()) keys.push_back(job.request_id());
    sizes.push_back(response.jobs_size());
    request.set_page_token(response.next_page_token());
    if (sizes.size() == 1) {
      Create("newer", 1);  // moves nothing
      Restart();
    }
  } while (!request.page_token().empty());
  EXPECT_THAT(keys, ElementsAre("key-4", "key-3", "key-2", "key-1", "key-0"));
  EXPECT_THAT(sizes, ElementsAre(2, 2, 1));
}

TEST_F(JobsTest, APageFitsIntoAMessage) {
  v1::CreateJobRequest header = HeaderFrame("");
  for (int i = 0; i < 16; ++i) {
    (*header.mutable_header()->mutable_spec()->mutable_metadata())[absl::StrCat(i)] =
        std::string(512, 'x');
  }
  constexpr int kJobs = 250;  // of 8 KB each
  options_.limits.max_jobs = kJobs;
  Restart();
  for (int i = 0; i < kJobs; ++i) {
    header.mutable_header()->set_request_id(absl::StrCat(i));
    ASSERT_TRUE(Send({header, ItemsFrame(CompletionItems(1)), CommitFrame(1)}).status.ok());
  }
  v1::ListJobsRequest request;
  request.set_page_size(1000);
  int num_jobs = 0;
  int num_pages = 0;
  do {
    v1::ListJobsResponse response;
    ASSERT_TRUE(List(request, &response).ok());
    EXPECT_LT(response.ByteSizeLong(), 2u << 20);
    num_jobs += response.jobs_size();
    ++num_pages;
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  EXPECT_EQ(num_jobs, kJobs);
  EXPECT_EQ(num_pages, 3);
}

TEST_F(JobsTest, ListsFilter) {
  for (int i = 0; i < 4; ++i) {
    v1::CreateJobRequest header = HeaderFrame(absl::StrCat("key-", i));
    (*header.mutable_header()->mutable_spec()->mutable_metadata())["parity"] =
        i % 2 == 0 ? "even" : "odd";
    ASSERT_TRUE(Send({header, ItemsFrame(CompletionItems(1)), CommitFrame(1)}).status.ok());
  }
  v1::ListJobsRequest all;
  v1::ListJobsResponse page;
  ASSERT_TRUE(List(all, &page).ok());
  EndJob(page.jobs(0).name(), 1);

  v1::ListJobsRequest request;
  (*request.mutable_metadata())["parity"] = "odd";
  EXPECT_THAT(Keys(request), ElementsAre("key-3", "key-1"));
  request.add_states(v1::JOB_STATE_COMPLETED);
  EXPECT_THAT(Keys(request), ElementsAre("key-3"));
  request.add_states(v1::JOB_STATE_QUEUED);
  EXPECT_THAT(Keys(request), ElementsAre("key-3", "key-1"));
  request.clear_metadata();
  request.clear_states();
  request.add_states(v1::JOB_STATE_VALIDATING);
  EXPECT_THAT(Keys(request), ElementsAre());
}

TEST_F(JobsTest, ListsRefuseWhatIsNoFilter) {
  for (int i = 0; i < 3; ++i) Create(absl::StrCat("key-", i), 1);
  v1::ListJobsRequest request;
  request.set_page_size(1);
  v1::ListJobsResponse page;
  ASSERT_TRUE(List(request, &page).ok());
  const std::string token = page.next_page_token();
  ASSERT_NE(token, "");

  request.set_page_token(token);
  ASSERT_TRUE(List(request, &page).ok());
  EXPECT_EQ(Explain(List(request, &page, "another")).violations.count("page_token"), 1u);
  request.add_states(v1::JOB_STATE_QUEUED);
  EXPECT_EQ(Explain(List(request, &page)).violations.count("page_token"), 1u);
  request.clear_states();
  for (const std::string& bad : {std::string("x"), token + "A", std::string(10000, 'A'),
                                 OpaqueToken("jobs of someone", 1)}) {
    request.set_page_token(bad);
    EXPECT_EQ(Explain(List(request, &page)).violations.count("page_token"), 1u) << bad;
  }
  request.clear_page_token();
  request.set_page_size(1001);
  request.add_states(static_cast<v1::JobState>(77));
  request.add_states(v1::JOB_STATE_UNSPECIFIED);
  (*request.mutable_metadata())[""] = "x";
  std::vector<std::string> fields;
  for (const auto& [field, why] : Explain(List(request, &page)).violations) fields.push_back(field);
  EXPECT_THAT(fields, ElementsAre("metadata.key", "page_size", "states[0]", "states[1]"));
}

TEST_F(JobsTest, CancelKeepsWhatIsFinishedAndIsSafeToRepeat) {
  const std::string name = Create("key", 10).name();
  EndItems(name, 0, 4);
  v1::Job job;
  ASSERT_TRUE(Cancel(name, &job).ok());
  EXPECT_EQ(job.state(), v1::JOB_STATE_CANCELLING);
  ASSERT_TRUE(Cancel(name, &job).ok());
  Finalize(name);
  ASSERT_TRUE(Cancel(name, &job).ok());
  EXPECT_EQ(job.state(), v1::JOB_STATE_CANCELLED);
  EXPECT_EQ(job.counts().succeeded(), 4);
  EXPECT_EQ(job.counts().cancelled(), 6);
  const std::string done = Create("other", 1).name();
  EndJob(done, 1);
  ASSERT_TRUE(Cancel(done, &job).ok());
  EXPECT_EQ(job.state(), v1::JOB_STATE_COMPLETED);
}

TEST_F(JobsTest, DeleteNeedsAnEndedJobAndItsEtag) {
  const v1::Job job = Create("key", 2);
  EXPECT_EQ(Explain(Delete(job.name())).code, grpc::StatusCode::FAILED_PRECONDITION);
  EndJob(job.name(), 2);
  EXPECT_EQ(Explain(Delete(job.name(), job.etag())).code, grpc::StatusCode::ABORTED);
  EXPECT_TRUE(Delete(job.name(), Get(job.name()).etag()).ok());
  EXPECT_EQ(Explain(Delete(job.name())).code, grpc::StatusCode::NOT_FOUND);
  EXPECT_NE(Create("key", 2).name(), job.name());  // the key is free again
}

TEST_F(JobsTest, RetryTakesWhatHasNoSuccess) {
  const std::string name = Create("key", 6).name();
  v1::RetryJobResponse response;
  EXPECT_EQ(Explain(Retry(name, "again", &response)).code, grpc::StatusCode::FAILED_PRECONDITION);
  EndJob(name, 6, /*failed=*/{1, 4});
  ASSERT_TRUE(Retry(name, "again", &response).ok());
  EXPECT_FALSE(response.already_existed());
  EXPECT_EQ(response.job().retry_of(), name);
  EXPECT_EQ(response.job().state(), v1::JOB_STATE_QUEUED);
  const auto items = store().ReadPending(IdOf(response.job().name()), 0, 10, 1 << 20);
  ASSERT_TRUE(items.ok());
  ASSERT_EQ(items->size(), 2u);
  EXPECT_EQ((*items)[0].custom_id, "item-1");
  EXPECT_EQ((*items)[1].custom_id, "item-4");

  const std::string retry = response.job().name();
  ASSERT_TRUE(Retry(name, "again", &response).ok());
  EXPECT_TRUE(response.already_existed());
  EXPECT_EQ(response.job().name(), retry);
  EXPECT_EQ(Explain(Retry(name, "key", &response)).code, grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(Explain(Retry(name, "", &response)).violations.count("request_id"), 1u);
  EndJob(retry, 2);
  EXPECT_EQ(Explain(Retry(retry, "third", &response)).reason, "NOTHING_TO_RETRY");
}

class OneJobTest : public JobsTest {
 protected:
  OneJobTest() : JobsTest({.limits = {.max_jobs = 1, .max_items = 10}}) {}
};

TEST_F(OneJobTest, ARetryCountsInTheQuota) {
  const std::string name = Create("key", 10).name();
  EndJob(name, 10, /*failed=*/{0, 1, 2, 3});
  const std::string other = Create("other", 1).name();
  v1::RetryJobResponse response;
  EXPECT_EQ(Explain(Retry(name, "again", &response)).reason, "QUOTA_EXCEEDED");
  EndJob(other, 1);
  EXPECT_TRUE(Retry(name, "again", &response).ok());
  EXPECT_TRUE(Retry(name, "again", &response).ok());  // is no new one
}

TEST_F(JobsTest, AnOwnersNameIsShort) {
  v1::ListJobsResponse response;
  EXPECT_EQ(Explain(List({}, &response, std::string(129, 'a'))).violations.count("latentd-owner"),
            1u);
}

TEST_F(JobsTest, MalformedRequestsAreRefused) {
  grpc::GenericStub generic(NewChannel());
  for (const char* method : {"GetJob", "ListJobs", "CancelJob", "WatchJob", "StreamResults"}) {
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto call =
        generic.PrepareCall(&context, absl::StrCat("/latentd.v1.BatchService/", method), &queue);
    void* tag = nullptr;
    bool ok = false;
    call->StartCall(nullptr);
    queue.Next(&tag, &ok);
    grpc::Slice slice("\x0a\x05zz");
    call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), nullptr);
    queue.Next(&tag, &ok);
    grpc::Status status;
    call->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    EXPECT_EQ(Explain(status).reason, "MALFORMED_MESSAGE") << method;
  }
}

TEST(BatchOwnerTest, IsThePeersAddress) {
  EXPECT_EQ(OwnerOfPeer("ipv4:10.1.2.3:4567"), "ipv4:10.1.2.3");
  EXPECT_EQ(OwnerOfPeer("ipv6:%5B2001:db8::7%5D:4567"), "ipv6:%5B2001:db8::7%5D");
  for (const char* local : {"ipv4:127.0.0.1:4567", "ipv6:%5B::1%5D:4567", "unix:/run/latentd.sock",
                            "unix:", "ipv6:%5B::ffff:127.0.0.1%5D:80"}) {
    EXPECT_EQ(OwnerOfPeer(local), "localhost") << local;
  }
}

TEST(OpaqueTokenTest, IsOfItsScope) {
  for (const int64_t position : {int64_t{0}, int64_t{1}, int64_t{1} << 40, INT64_MAX}) {
    const std::string token = OpaqueToken("results of jobs/a", position);
    EXPECT_EQ(ReadOpaqueToken("results of jobs/a", token), position);
    EXPECT_EQ(ReadOpaqueToken("results of jobs/b", token), std::nullopt);
    for (size_t i = 0; i < token.size(); ++i) {
      std::string changed = token;
      changed[i] = changed[i] == 'A' ? 'B' : 'A';
      EXPECT_EQ(ReadOpaqueToken("results of jobs/a", changed), std::nullopt);
    }
  }
  EXPECT_EQ(ReadOpaqueToken("x", OpaqueToken("x", -1)), std::nullopt);
}

}  // namespace
}  // namespace latentd
