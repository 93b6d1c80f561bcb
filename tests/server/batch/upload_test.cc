// BatchService.CreateJob and GetUpload: what is stored, what is refused and how it is told, how a
// broken upload goes on.

#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "grpcpp/generic/generic_stub.h"
#include "tests/server/batch/batch_fixture.h"

namespace latentd {
namespace {

using testing::HasSubstr;
using Frames = std::vector<v1::CreateJobRequest>;

class UploadTest : public BatchTest {
 protected:
  using BatchTest::BatchTest;

  grpc::Status GetUpload(const std::string& request_id, v1::GetUploadResponse* response,
                         const std::string& owner = "") {
    grpc::ClientContext context;
    if (!owner.empty()) context.AddMetadata("latentd-owner", owner);
    v1::GetUploadRequest request;
    request.set_request_id(request_id);
    return stub().GetUpload(&context, request, response);
  }
  int64_t StoredOf(const std::string& request_id) {
    v1::GetUploadResponse response;
    EXPECT_TRUE(GetUpload(request_id, &response).ok());
    return response.item_count();
  }
  bool IsKnown(const std::string& request_id) {
    v1::GetUploadResponse response;
    const grpc::Status status = GetUpload(request_id, &response);
    if (status.ok()) return true;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
    return false;
  }
  Error Refused(const Frames& frames, const std::string& owner = "") {
    const Created created = Send(frames, owner);
    EXPECT_FALSE(created.status.ok());
    return Explain(created.status);
  }
};

TEST_F(UploadTest, AJobIsWhatWasSentWithTheDefaults) {
  Frames frames = {HeaderFrame("key")};
  (*frames[0].mutable_header()->mutable_spec()->mutable_metadata())["team"] = "a";
  const auto items = CompletionItems(10);
  frames.push_back(ItemsFrame({items.begin(), items.begin() + 4}));
  frames.push_back(ItemsFrame({items.begin() + 4, items.end()}));
  frames.push_back(CommitFrame(10, ChainOf(items)));
  const Created created = Send(frames);
  ASSERT_TRUE(created.status.ok()) << created.status.error_message();
  EXPECT_FALSE(created.response.already_existed());
  const v1::Job& job = created.response.job();
  EXPECT_THAT(job.name(), testing::MatchesRegex("jobs/[0-9a-f]{32}"));
  EXPECT_EQ(job.state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(job.counts().total(), 10);
  EXPECT_EQ(job.counts().pending(), 10);
  EXPECT_EQ(job.request_id(), "key");
  EXPECT_EQ(job.spec().model(), "demo");
  EXPECT_EQ(job.spec().completion_window().seconds(), 24 * 3600);
  EXPECT_EQ(job.spec().max_attempts_per_item(), 5);
  EXPECT_EQ(job.spec().result_ttl().seconds(), 30 * 24 * 3600);
  EXPECT_EQ(job.spec().metadata().at("team"), "a");

  const auto stored = store().ReadPending(IdOf(job.name()), 0, 100, 1 << 20);
  ASSERT_TRUE(stored.ok()) << stored.status();
  ASSERT_EQ(stored->size(), 10u);
  for (size_t i = 0; i < 10; ++i) {
    EXPECT_EQ((*stored)[i].custom_id, items[i].custom_id());
    EXPECT_EQ((*stored)[i].request, items[i].SerializeAsString());
  }
}

TEST_F(UploadTest, TheSameAgainIsTheSameJob) {
  const auto items = CompletionItems(6);
  const Frames frames = {HeaderFrame("key"), ItemsFrame(items), CommitFrame(6, ChainOf(items))};
  const Created first = Send(frames);
  ASSERT_TRUE(first.status.ok()) << first.status.error_message();
  const Created again = Send(frames);
  ASSERT_TRUE(again.status.ok()) << again.status.error_message();
  EXPECT_TRUE(again.response.already_existed());
  EXPECT_EQ(again.response.job().name(), first.response.job().name());
  // A part of it and the commit alone do, too.
  for (const int64_t first_item : {3, 6}) {
    Frames rest = {HeaderFrame("key", first_item)};
    if (first_item < 6) rest.push_back(ItemsFrame(CompletionItems(6 - first_item, first_item)));
    rest.push_back(CommitFrame(6, ChainOf(items)));
    const Created part = Send(rest);
    ASSERT_TRUE(part.status.ok()) << part.status.error_message();
    EXPECT_TRUE(part.response.already_existed());
  }
  // After a restart, and when the job has ended.
  EndJob(first.response.job().name(), 6);
  Restart();
  const Created late = Send(frames);
  ASSERT_TRUE(late.status.ok()) << late.status.error_message();
  EXPECT_TRUE(late.response.already_existed());
  EXPECT_EQ(late.response.job().state(), v1::JOB_STATE_COMPLETED);
}

TEST_F(UploadTest, AKeyIsOfOneJobAlone) {
  Create("key", 4);
  auto items = CompletionItems(4);
  items[2].mutable_complete()->set_text("another");
  EXPECT_EQ(Refused({HeaderFrame("key"), ItemsFrame(items), CommitFrame(4)}).code,
            grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(Refused({HeaderFrame("key"), ItemsFrame(CompletionItems(5)), CommitFrame(5)}).code,
            grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(Refused({HeaderFrame("key"), ItemsFrame(CompletionItems(3)), CommitFrame(3)}).code,
            grpc::StatusCode::ALREADY_EXISTS);
  Frames other = {HeaderFrame("key"), ItemsFrame(CompletionItems(4)), CommitFrame(4)};
  other[0].mutable_header()->mutable_spec()->set_priority(1);
  EXPECT_EQ(Refused(other).code, grpc::StatusCode::ALREADY_EXISTS);
  // Another owner's key is another.
  EXPECT_NE(Create("key", 4, "someone").name(), "");
  // The job is what it was.
  const Created again = Send({HeaderFrame("key"), ItemsFrame(CompletionItems(4)), CommitFrame(4)});
  EXPECT_TRUE(again.status.ok()) << again.status.error_message();
}

TEST_F(UploadTest, ABrokenUploadGoesOn) {
  const auto items = CompletionItems(20);
  EXPECT_FALSE(IsKnown("key"));
  const Error error = Refused({HeaderFrame("key"), ItemsFrame(CompletionItems(8))});
  EXPECT_EQ(error.reason, "NO_COMMIT");
  EXPECT_EQ(error.metadata.at("items"), "8");
  v1::GetUploadResponse upload;
  ASSERT_TRUE(GetUpload("key", &upload).ok());
  EXPECT_EQ(upload.item_count(), 8);
  EXPECT_EQ(upload.sha256(), ChainOf(CompletionItems(8)));
  EXPECT_FALSE(upload.has_job());

  Restart();
  // With an overlap of three.
  const Created created = Send(
      {HeaderFrame("key", 5), ItemsFrame(CompletionItems(15, 5)), CommitFrame(20, ChainOf(items))});
  ASSERT_TRUE(created.status.ok()) << created.status.error_message();
  EXPECT_FALSE(created.response.already_existed());
  EXPECT_EQ(created.response.job().counts().total(), 20);
  ASSERT_TRUE(GetUpload("key", &upload).ok());
  EXPECT_EQ(upload.job().name(), created.response.job().name());
}

TEST_F(UploadTest, AnOverlapMustBeTheSame) {
  Refused({HeaderFrame("key"), ItemsFrame(CompletionItems(8))});
  auto items = CompletionItems(8, 4);
  items[1].set_custom_id("another");
  EXPECT_EQ(Refused({HeaderFrame("key", 4), ItemsFrame(items), CommitFrame(12)}).code,
            grpc::StatusCode::ALREADY_EXISTS);
  EXPECT_EQ(StoredOf("key"), 8);  // kept: a mistake of this call
  const Error error = Refused({HeaderFrame("key", 9), CommitFrame(9)});
  EXPECT_EQ(error.violations.at("header.first_item"), "is 9; 8 items are stored");
  EXPECT_EQ(Refused({HeaderFrame("new", 1), CommitFrame(1)}).violations.count("header.first_item"),
            1u);
  EXPECT_FALSE(IsKnown("new"));
}

TEST_F(UploadTest, AllThatIsWrongIsToldAtTheCommitAndNothingIsKept) {
  auto items = CompletionItems(12);
  items[1].set_custom_id("item-0");
  items[3].mutable_complete()->mutable_sampling()->set_top_p(7);
  items[4].set_custom_id("");
  items[5].clear_complete();
  items[6].mutable_complete()->set_model("gpt");
  items[7].mutable_complete()->mutable_serving()->set_priority(1);
  items[8].mutable_complete()->mutable_serving()->mutable_queue_timeout()->set_seconds(1);
  items[9].mutable_complete()->mutable_outputs()->set_n(2);
  items[10].mutable_chat()->set_chat_template("x");
  items[11].set_custom_id(std::string(257, 'x'));
  const Error error = Refused({HeaderFrame("key"), ItemsFrame(items), CommitFrame(12)});
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(error.reason, "INVALID_FIELD");
  std::vector<std::string> fields;
  for (const auto& [field, description] : error.violations) fields.push_back(field);
  EXPECT_THAT(
      fields,
      testing::UnorderedElementsAre(
          "items[1].custom_id", "items[3].complete.sampling.top_p", "items[4].custom_id",
          "items[5].request", "items[6].complete.model", "items[7].complete.serving.priority",
          "items[8].complete.serving.queue_timeout", "items[9].complete.outputs.n",
          "items[10].chat.messages", "items[10].chat.chat_template", "items[11].custom_id"));
  EXPECT_THAT(error.violations.at("items[1].custom_id"), HasSubstr("item-0"));
  EXPECT_FALSE(IsKnown("key"));
}

TEST_F(UploadTest, WhatIsWrongIsFoundAgainByTheNextAttempt) {
  auto items = CompletionItems(6);
  items[2].mutable_complete()->mutable_sampling()->set_top_p(7);
  Refused({HeaderFrame("key"), ItemsFrame(items)});  // no commit
  EXPECT_EQ(StoredOf("key"), 2);
  const Error error = Refused(
      {HeaderFrame("key", 2), ItemsFrame({items.begin() + 2, items.end()}), CommitFrame(6)});
  EXPECT_EQ(error.violations.count("items[2].complete.sampling.top_p"), 1u);
}

TEST_F(UploadTest, DuplicatesAreToldTogether) {
  auto items = CompletionItems(50);
  for (int i : {10, 20, 49}) items[i].set_custom_id("item-3");
  const Error error = Refused({HeaderFrame("key"), ItemsFrame(items), CommitFrame(50)});
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_EQ(error.violations.size(), 3u);
  EXPECT_EQ(error.violations.count("items[49].custom_id"), 1u);
  EXPECT_FALSE(IsKnown("key"));
}

TEST_F(UploadTest, AHundredWrongItemsEndTheCall) {
  std::vector<v1::BatchItem> items(1000);
  const Error error = Refused({HeaderFrame("key"), ItemsFrame(items)});  // before the commit
  EXPECT_EQ(error.reason, "INVALID_FIELD");
  EXPECT_GT(error.violations.size(), 20u);
  EXPECT_LE(error.violations.size(), 100u);
  EXPECT_FALSE(IsKnown("key"));
}

TEST_F(UploadTest, ACommitMustFit) {
  EXPECT_EQ(Refused({HeaderFrame("a"), ItemsFrame(CompletionItems(4)), CommitFrame(5)})
                .violations.at("commit.item_count"),
            "is 5; the upload has 4 items");
  EXPECT_FALSE(IsKnown("a"));
  EXPECT_EQ(Refused({HeaderFrame("b"), CommitFrame(0)}).violations.count("commit.item_count"), 1u);
  EXPECT_EQ(Refused({HeaderFrame("c"), ItemsFrame(CompletionItems(4)),
                     CommitFrame(4, std::string(32, 'x'))})
                .violations.count("commit.sha256"),
            1u);
  EXPECT_FALSE(IsKnown("c"));
}

TEST_F(UploadTest, FramesHaveAnOrder) {
  EXPECT_THAT(Refused({ItemsFrame(CompletionItems(1))}).message, HasSubstr("first message"));
  EXPECT_THAT(Refused({CommitFrame(1)}).message, HasSubstr("first message"));
  EXPECT_THAT(Refused({HeaderFrame("key"), HeaderFrame("key")}).message,
              HasSubstr("a second header"));
  EXPECT_EQ(Refused({HeaderFrame("key"), v1::CreateJobRequest()}).reason, "BAD_FRAME");
  EXPECT_EQ(Refused({}).reason, "NO_COMMIT");
}

TEST_F(UploadTest, AHeaderIsChecked) {
  const auto fields = [&](const std::function<void(v1::CreateJobRequest::Header*)>& change) {
    v1::CreateJobRequest frame = HeaderFrame("key");
    change(frame.mutable_header());
    std::string all;
    for (const auto& [field, description] : Refused({frame}).violations) all += field + " ";
    return all;
  };
  EXPECT_EQ(fields([](auto* header) { header->clear_request_id(); }), "header.request_id ");
  EXPECT_EQ(fields([](auto* header) { header->set_request_id(std::string(129, 'a')); }),
            "header.request_id ");
  EXPECT_EQ(fields([](auto* header) { header->set_request_id("a\n"); }), "header.request_id ");
  EXPECT_EQ(fields([](auto* header) { header->set_first_item(-1); }), "header.first_item ");
  EXPECT_EQ(fields([](auto* header) { header->mutable_spec()->set_priority(1001); }),
            "header.spec.priority ");
  EXPECT_EQ(fields([](auto* header) { header->mutable_spec()->mutable_completion_window(); }),
            "header.spec.completion_window ");
  EXPECT_EQ(fields([](auto* header) {
              header->mutable_spec()->mutable_result_ttl()->set_seconds(59);
              header->mutable_spec()->set_max_attempts_per_item(0);
              (*header->mutable_spec()->mutable_metadata())[""] = "x";
            }),
            "header.spec.max_attempts_per_item header.spec.metadata.key header.spec.result_ttl ");
  v1::CreateJobRequest frame = HeaderFrame("key");
  frame.mutable_header()->mutable_spec()->set_model("gpt");
  EXPECT_EQ(Refused({frame}).reason, "MODEL_NOT_FOUND");
  EXPECT_FALSE(IsKnown("key"));
}

// The bytes of frames that no client library writes.
TEST_F(UploadTest, MalformedBytesAreRefused) {
  const auto send = [&](const std::vector<std::string>& frames) {
    grpc::GenericStub generic(NewChannel());
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto call = generic.PrepareCall(&context, "/latentd.v1.BatchService/CreateJob", &queue);
    void* tag = nullptr;
    bool ok = false;
    call->StartCall(nullptr);
    queue.Next(&tag, &ok);
    for (const std::string& frame : frames) {
      grpc::Slice slice(frame);
      call->Write(grpc::ByteBuffer(&slice, 1), nullptr);
      queue.Next(&tag, &ok);
      if (!ok) break;
    }
    grpc::Status status;
    call->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    return Explain(status);
  };
  const std::string header = HeaderFrame("key").SerializeAsString();
  EXPECT_EQ(send({"\x12\x05zz"}).reason, "MALFORMED_MESSAGE");
  EXPECT_EQ(send({header, "\xff"}).reason, "MALFORMED_MESSAGE");
  EXPECT_EQ(send({header + header}).reason, "BAD_FRAME");
  // An item that is none is one of those that are told at the commit.
  const Error error = send(
      {header, std::string("\x12\x04\x0a\x02\xff\xff", 6), CommitFrame(1).SerializeAsString()});
  EXPECT_EQ(error.violations.count("items[0]"), 1u);
}

class SmallLimitsTest : public UploadTest {
 protected:
  SmallLimitsTest()
      : UploadTest(
            {.limits = {
                 .max_item_bytes = 1000, .max_job_items = 20, .max_jobs = 2, .max_items = 30}}) {}
};

TEST_F(SmallLimitsTest, TooLargeAnItem) {
  auto items = CompletionItems(2);
  items[1].mutable_complete()->set_text(std::string(2000, 'x'));
  const Error error = Refused({HeaderFrame("key"), ItemsFrame(items), CommitFrame(2)});
  EXPECT_THAT(error.violations.at("items[1]"), HasSubstr("at most 1000"));
}

TEST_F(SmallLimitsTest, TooLongAJob) {
  Create("fits", 20);
  const Error error =
      Refused({HeaderFrame("key"), ItemsFrame(CompletionItems(21)), CommitFrame(21)}, "another");
  EXPECT_EQ(error.code, grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(error.violations.at("items"), HasSubstr("20"));
}

TEST_F(SmallLimitsTest, AnOwnersJobsAndItems) {
  const v1::Job job = Create("one", 20);
  Error error = Refused({HeaderFrame("two"), ItemsFrame(CompletionItems(11)), CommitFrame(11)});
  EXPECT_EQ(error.code, grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(error.reason, "QUOTA_EXCEEDED");
  EXPECT_EQ(error.metadata.at("limit"), "30");
  EXPECT_EQ(error.metadata.at("value"), "31");
  EXPECT_EQ(error.retry_seconds, 60);
  Create("two", 10);
  error = Refused({HeaderFrame("three"), ItemsFrame(CompletionItems(1)), CommitFrame(1)});
  EXPECT_EQ(error.reason, "QUOTA_EXCEEDED");
  EXPECT_EQ(error.metadata.at("limit"), "2");
  EXPECT_FALSE(IsKnown("three"));
  // Known ones are no new ones, others have quotas of their own, and what ends makes room.
  const Created again =
      Send({HeaderFrame("one"), ItemsFrame(CompletionItems(20)), CommitFrame(20)});
  EXPECT_TRUE(again.status.ok()) << again.status.error_message();
  Create("three", 20, "another");
  EndJob(job.name(), 20);
  Create("three", 20);
}

class TwoUploadsTest : public UploadTest {
 protected:
  TwoUploadsTest() : UploadTest({.limits = {}, .max_uploads = 2}) {}
};

TEST_F(TwoUploadsTest, OneMoreIsRefused) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientWriter<v1::CreateJobRequest>>> writers;
  std::vector<v1::CreateJobResponse> responses(2);
  for (int i = 0; i < 2; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    writers.push_back(stub().CreateJob(contexts.back().get(), &responses[i]));
    ASSERT_TRUE(writers.back()->Write(HeaderFrame(absl::StrCat("open-", i))));
    ASSERT_TRUE(Eventually([&] { return IsKnown(absl::StrCat("open-", i)); }));
  }
  const Error error = Refused({HeaderFrame("key"), ItemsFrame(CompletionItems(1)), CommitFrame(1)});
  EXPECT_EQ(error.reason, "TOO_MANY_REQUESTS");
  for (const auto& context : contexts) context->TryCancel();
  for (const auto& writer : writers) {
    EXPECT_EQ(writer->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ASSERT_TRUE(Eventually([&] {
    return Send({HeaderFrame("key"), ItemsFrame(CompletionItems(1)), CommitFrame(1)}).status.ok();
  }));
}

TEST_F(UploadTest, TheLatestCallUploads) {
  grpc::ClientContext context;
  v1::CreateJobResponse response;
  const auto old = stub().CreateJob(&context, &response);
  ASSERT_TRUE(old->Write(HeaderFrame("key")));
  ASSERT_TRUE(old->Write(ItemsFrame(CompletionItems(5))));
  ASSERT_TRUE(Eventually([&] { return IsKnown("key") && StoredOf("key") == 5; }));
  const Created created =
      Send({HeaderFrame("key", 5), ItemsFrame(CompletionItems(5, 5)), CommitFrame(10)});
  EXPECT_TRUE(created.status.ok()) << created.status.error_message();
  const Error error = Explain(old->Finish());
  EXPECT_EQ(error.code, grpc::StatusCode::ABORTED);
  EXPECT_EQ(error.reason, "UPLOAD_SUPERSEDED");
}

// Many at once, cancelled at random and taken up again, under few keys: each job is whole in the
// end.
TEST_F(UploadTest, ConcurrentUploadsEndWhole) {
  constexpr int kKeys = 4;
  constexpr int kItems = 300;
  const auto items = CompletionItems(kItems);
  const std::string chain = ChainOf(items);
  std::vector<std::thread> clients;
  for (int client = 0; client < 2 * kKeys; ++client) {
    clients.emplace_back([&, client] {
      std::mt19937 random(client);
      const std::string key = absl::StrCat("key-", client % kKeys);
      for (int attempt = 0;; ++attempt) {
        ASSERT_LT(attempt, 500);
        v1::GetUploadResponse upload;
        const int64_t first = GetUpload(key, &upload).ok() ? upload.item_count() : 0;
        grpc::ClientContext context;
        v1::CreateJobResponse response;
        const auto writer = stub().CreateJob(&context, &response);
        bool ok = writer->Write(HeaderFrame(key, first));
        const bool break_off = attempt < 5 && random() % 2 == 0;
        for (int64_t next = first; ok && next < kItems;) {
          const int64_t count = std::min<int64_t>(kItems - next, 1 + random() % 50);
          ok = writer->Write(ItemsFrame(CompletionItems(count, next)));
          next += count;
          if (break_off && random() % 4 == 0) context.TryCancel();
        }
        if (ok) writer->Write(CommitFrame(kItems, chain));
        writer->WritesDone();
        if (writer->Finish().ok()) return;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  for (int key = 0; key < kKeys; ++key) {
    v1::GetUploadResponse upload;
    ASSERT_TRUE(GetUpload(absl::StrCat("key-", key), &upload).ok());
    EXPECT_EQ(upload.job().counts().total(), kItems);
    EXPECT_EQ(upload.sha256(), chain);
  }
}

// More than fits under way at once.
TEST_F(UploadTest, LargeFramesAreTakenInParts) {
  std::vector<v1::BatchItem> items = CompletionItems(4000);
  for (size_t i = 0; i < items.size(); ++i) {
    items[i].mutable_complete()->set_text(std::string(800 + i % 7, 'x'));
  }
  std::vector<v1::CreateJobRequest> frames = {HeaderFrame("key")};
  for (int part = 0; part < 2; ++part) {  // 1.6 MB each, below gRPC's default limit
    frames.push_back(ItemsFrame({items.begin() + part * 2000, items.begin() + (part + 1) * 2000}));
  }
  frames.push_back(CommitFrame(4000, ChainOf(items)));
  const Created created = Send(frames);
  EXPECT_TRUE(created.status.ok()) << created.status.error_message();
  EXPECT_EQ(created.response.job().counts().total(), 4000);
}

class LoadingTest : public UploadTest {
 protected:
  LoadingTest() : UploadTest({}, /*load=*/false) {}
};

TEST_F(LoadingTest, JobsAreTakenOnceTheModelIsThere) {
  EXPECT_EQ(Refused({HeaderFrame("key")}).reason, "LOADING");
  EXPECT_FALSE(IsKnown("key"));  // is answered
  service().SetServing(DemoModel());
  Create("key", 1);
}

TEST_F(UploadTest, ADrainEndsUploadsThatCanGoOnLater) {
  grpc::ClientContext context;
  v1::CreateJobResponse response;
  const auto writer = stub().CreateJob(&context, &response);
  ASSERT_TRUE(writer->Write(HeaderFrame("key")));
  ASSERT_TRUE(writer->Write(ItemsFrame(CompletionItems(5))));
  ASSERT_TRUE(Eventually([&] { return IsKnown("key") && StoredOf("key") == 5; }));
  service().StartDrain();
  EXPECT_EQ(Explain(writer->Finish()).reason, "DRAINING");
  EXPECT_EQ(Refused({HeaderFrame("key", 5)}).reason, "DRAINING");
  EXPECT_EQ(StoredOf("key"), 5);  // what needs no model is answered still
  Restart();
  const Created created =
      Send({HeaderFrame("key", 5), CommitFrame(5, ChainOf(CompletionItems(5)))});
  EXPECT_TRUE(created.status.ok()) << created.status.error_message();
}

TEST(DisabledBatchTest, EveryCallSaysSo) {
  ChangeHub hub;
  BatchService service({}, /*store=*/nullptr, &hub);
  service.SetServing(DemoModel());
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(service.grpc_service());
  const auto server = builder.BuildAndStart();
  const auto stub = v1::BatchService::NewStub(
      grpc::CreateChannel(absl::StrCat("127.0.0.1:", port), grpc::InsecureChannelCredentials()));
  const auto expect = [](const grpc::Status& status) {
    const Error error = Explain(status);
    EXPECT_EQ(error.code, grpc::StatusCode::FAILED_PRECONDITION);
    EXPECT_EQ(error.reason, "BATCH_DISABLED");
  };
  {
    grpc::ClientContext context;
    v1::CreateJobResponse response;
    expect(stub->CreateJob(&context, &response)->Finish());
  }
  {
    grpc::ClientContext context;
    v1::ListJobsResponse response;
    expect(stub->ListJobs(&context, {}, &response));
  }
  {
    grpc::ClientContext context;
    expect(stub->WatchJob(&context, {})->Finish());
  }
  {
    grpc::ClientContext context;
    expect(stub->StreamResults(&context, {})->Finish());
  }
  server->Shutdown(std::chrono::system_clock::now());
}

}  // namespace
}  // namespace latentd
