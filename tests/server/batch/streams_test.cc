// BatchService.WatchJob and StreamResults: what is told, to whom, and when it ends.

#include <functional>
#include <map>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "tests/server/batch/batch_fixture.h"

namespace latentd {
namespace {

using testing::ElementsAre;

// A stream that a thread of its own reads.
template <typename Response>
class Reading {
 public:
  using Reader = std::unique_ptr<grpc::ClientReader<Response>>;

  explicit Reading(std::function<Reader(grpc::ClientContext*)> start)
      : reader_(start(&context_)), thread_([this] {
          Response response;
          while (reader_->Read(&response)) {
            absl::MutexLock lock(&mutex_);
            messages_.push_back(response);
          }
          status_ = reader_->Finish();
        }) {}
  ~Reading() {
    context_.TryCancel();
    if (thread_.joinable()) thread_.join();
  }

  std::vector<Response> messages() const {
    absl::MutexLock lock(&mutex_);
    return messages_;
  }
  bool AwaitCount(size_t count) {
    return Eventually([&] { return messages().size() >= count; });
  }
  grpc::Status Finish() {
    thread_.join();
    return status_;
  }
  void Cancel() { context_.TryCancel(); }

 private:
  grpc::ClientContext context_;
  Reader reader_;
  mutable absl::Mutex mutex_;
  std::vector<Response> messages_ ABSL_GUARDED_BY(mutex_);
  grpc::Status status_;
  std::thread thread_;
};
using Watch = Reading<v1::WatchJobResponse>;
using Results = Reading<v1::StreamResultsResponse>;

class StreamsTest : public BatchTest {
 protected:
  std::unique_ptr<Watch> StartWatch(const std::string& name, int64_t from_revision = 0) {
    return std::make_unique<Watch>([&](grpc::ClientContext* context) {
      v1::WatchJobRequest request;
      request.set_name(name);
      request.set_from_revision(from_revision);
      return stub().WatchJob(context, request);
    });
  }
  static v1::StreamResultsRequest ResultsOf(const std::string& name, const std::string& cursor = "",
                                            bool follow = false) {
    v1::StreamResultsRequest request;
    request.set_name(name);
    request.set_cursor(cursor);
    request.set_follow(follow);
    return request;
  }
  std::unique_ptr<Results> StartResults(const v1::StreamResultsRequest& request) {
    return std::make_unique<Results>(
        [&](grpc::ClientContext* context) { return stub().StreamResults(context, request); });
  }
  // Those that there are now.
  std::vector<v1::ItemResult> Read(const v1::StreamResultsRequest& request,
                                   std::string* cursor = nullptr) {
    const auto results = StartResults(request);
    const grpc::Status status = results->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    std::vector<v1::ItemResult> all;
    for (const v1::StreamResultsResponse& response : results->messages()) {
      all.insert(all.end(), response.results().begin(), response.results().end());
      if (cursor != nullptr) *cursor = response.cursor();
    }
    return all;
  }
};

// ---- WatchJob ----------------------------------------------------------------------------------

TEST_F(StreamsTest, AWatchTellsTheJobAndItsChangesToItsEnd) {
  const std::string name = Create("key", 10).name();
  const auto watch = StartWatch(name);
  ASSERT_TRUE(watch->AwaitCount(1));
  EXPECT_EQ(watch->messages()[0].job().state(), v1::JOB_STATE_QUEUED);
  EndItems(name, 0, 3);
  ASSERT_TRUE(Eventually([&] { return watch->messages().back().job().counts().succeeded() == 3; }));
  EndItems(name, 3, 7);
  Finalize(name);
  const grpc::Status status = watch->Finish();
  EXPECT_TRUE(status.ok()) << status.error_message();
  const auto messages = watch->messages();
  EXPECT_EQ(messages.back().job().state(), v1::JOB_STATE_COMPLETED);
  for (size_t i = 1; i < messages.size(); ++i) {
    EXPECT_GT(messages[i].job().revision(), messages[i - 1].job().revision());
    EXPECT_GE(messages[i].job().state(), messages[i - 1].job().state());
  }
}

TEST_F(StreamsTest, AWatchFromARevisionTellsWhatIsNew) {
  const v1::Job job = Create("key", 2);
  const auto watch = StartWatch(job.name(), job.revision());
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_TRUE(watch->messages().empty());
  EndItems(job.name(), 0, 1);
  ASSERT_TRUE(watch->AwaitCount(1));
  EXPECT_GT(watch->messages()[0].job().revision(), job.revision());
  EndItems(job.name(), 1, 1);
  Finalize(job.name());
  EXPECT_TRUE(watch->Finish().ok());
  // An ended job: what there is, or nothing.
  const auto late = StartWatch(job.name());
  EXPECT_TRUE(late->Finish().ok());
  EXPECT_EQ(late->messages().size(), 1u);
  const auto latest = StartWatch(job.name(), late->messages()[0].job().revision());
  EXPECT_TRUE(latest->Finish().ok());
  EXPECT_TRUE(latest->messages().empty());
}

TEST_F(StreamsTest, ManyWatchersAllSeeTheEnd) {
  const std::string one = Create("one", 20).name();
  const std::string other = Create("other", 1).name();
  std::vector<std::unique_ptr<Watch>> watches;
  for (int i = 0; i < 20; ++i) watches.push_back(StartWatch(one));
  const auto others = StartWatch(other);
  for (const auto& watch : watches) ASSERT_TRUE(watch->AwaitCount(1));
  for (int i = 0; i < 5; ++i) watches[i]->Cancel();
  for (int i = 0; i < 20; ++i) EndItems(one, i, 1);
  Finalize(one);
  for (int i = 0; i < 20; ++i) {
    const grpc::Status status = watches[i]->Finish();
    if (i < 5) {
      EXPECT_EQ(status.error_code(), grpc::StatusCode::CANCELLED);
    } else {
      EXPECT_TRUE(status.ok());
      EXPECT_EQ(watches[i]->messages().back().job().counts().succeeded(), 20);
    }
  }
  EXPECT_EQ(others->messages().size(), 1u);  // of its own job alone
}

TEST_F(StreamsTest, AWatchOfADeletedOrUnknownJobEnds) {
  EXPECT_EQ(Explain(StartWatch("jobs/nothing")->Finish()).reason, "JOB_NOT_FOUND");
  EXPECT_EQ(Explain(StartWatch("")->Finish()).violations.count("name"), 1u);
}

// A client that does not read holds one message; what it reads later is what is then.
TEST_F(StreamsTest, ASlowWatcherGetsJoinedMessages) {
  constexpr int kItems = 400;
  v1::CreateJobRequest header = HeaderFrame("key");
  for (int i = 0; i < 16; ++i) {  // a job of 8 KB, so that the window is full soon
    (*header.mutable_header()->mutable_spec()->mutable_metadata())[absl::StrCat(i)] =
        std::string(512, 'x');
  }
  const Created created = Send({header, ItemsFrame(CompletionItems(kItems)), CommitFrame(kItems)});
  ASSERT_TRUE(created.status.ok()) << created.status.error_message();
  const std::string name = created.response.job().name();
  grpc::ClientContext context;
  v1::WatchJobRequest request;
  request.set_name(name);
  const auto reader = stub().WatchJob(&context, request);
  v1::WatchJobResponse response;
  ASSERT_TRUE(reader->Read(&response));
  for (int i = 0; i < kItems; ++i) EndItems(name, i, 1);
  Finalize(name);
  int count = 1;
  int64_t revision = response.job().revision();
  while (reader->Read(&response)) {
    EXPECT_GT(response.job().revision(), revision);
    revision = response.job().revision();
    ++count;
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(response.job().state(), v1::JOB_STATE_COMPLETED);
  EXPECT_LT(count, 2 * kItems);  // of so many changes
}

// ---- StreamResults -----------------------------------------------------------------------------

TEST_F(StreamsTest, ResultsComeInTheOrderOfTheirCommits) {
  const std::string name = Create("key", 6).name();
  EXPECT_TRUE(Read(ResultsOf(name)).empty());
  EndItems(name, 4, 2, /*failed=*/{5});
  EndItems(name, 0, 2);
  const auto results = Read(ResultsOf(name));
  std::vector<int64_t> indices;
  for (const v1::ItemResult& result : results) indices.push_back(result.index());
  EXPECT_THAT(indices, ElementsAre(4, 5, 0, 1));
  EXPECT_EQ(results[0].custom_id(), "item-4");
  EXPECT_EQ(results[0].state(), v1::ITEM_STATE_SUCCEEDED);
  EXPECT_EQ(results[0].complete().request_id(), "answer 4");
  EXPECT_EQ(results[0].attempts(), 1);
  EXPECT_EQ(results[1].state(), v1::ITEM_STATE_FAILED);
  EXPECT_EQ(results[1].error().reason(), "INVALID_FIELD");
}

TEST_F(StreamsTest, ACursorGoesOnWhereItStoppedAfterARestartToo) {
  const std::string name = Create("key", 10).name();
  EndItems(name, 0, 4);
  std::string cursor;
  EXPECT_EQ(Read(ResultsOf(name), &cursor).size(), 4u);
  EXPECT_TRUE(Read(ResultsOf(name, cursor)).empty());
  Restart();
  EndItems(name, 4, 6);
  Finalize(name);
  const auto rest = Read(ResultsOf(name, cursor));
  ASSERT_EQ(rest.size(), 6u);
  EXPECT_EQ(rest[0].index(), 4);
  EXPECT_EQ(Read(ResultsOf(name)).size(), 10u);
}

TEST_F(StreamsTest, ACursorIsOfOneJob) {
  const std::string one = Create("one", 1).name();
  const std::string other = Create("other", 1).name();
  EndJob(one, 1);
  std::string cursor;
  Read(ResultsOf(one), &cursor);
  EXPECT_EQ(Explain(StartResults(ResultsOf(other, cursor))->Finish()).violations.at("cursor"),
            "is not of this job");
  EXPECT_EQ(Explain(StartResults(ResultsOf(one, "???"))->Finish()).violations.count("cursor"), 1u);
  EXPECT_EQ(Explain(StartResults(ResultsOf("jobs/x"))->Finish()).reason, "JOB_NOT_FOUND");
  v1::StreamResultsRequest request = ResultsOf(one);
  request.add_states(v1::ITEM_STATE_RUNNING);
  EXPECT_EQ(Explain(StartResults(request)->Finish()).violations.count("states[0]"), 1u);
}

TEST_F(StreamsTest, StatesAreAFilter) {
  const std::string name = Create("key", 3000).name();
  EndItems(name, 0, 2000, /*failed=*/{5, 1500});
  v1::StreamResultsRequest request = ResultsOf(name);
  request.add_states(v1::ITEM_STATE_FAILED);
  std::vector<int64_t> indices;
  for (const v1::ItemResult& result : Read(request)) indices.push_back(result.index());
  EXPECT_THAT(indices, ElementsAre(5, 1500));
  request.add_states(v1::ITEM_STATE_CANCELLED);
  ASSERT_TRUE(store().EndJob(IdOf(name), v1::JOB_STATE_CANCELLED, "").ok());
  Finalize(name);
  EXPECT_EQ(Read(request).size(), 2u + 1000u);
}

TEST_F(StreamsTest, FollowTailsARunningJobToItsEnd) {
  const std::string name = Create("key", 50).name();
  const auto results = StartResults(ResultsOf(name, "", /*follow=*/true));
  EndItems(name, 0, 5);
  ASSERT_TRUE(results->AwaitCount(1));
  for (int i = 5; i < 50; i += 5) EndItems(name, i, 5);
  absl::SleepFor(absl::Milliseconds(20));
  Finalize(name);
  EXPECT_TRUE(results->Finish().ok());
  std::map<int64_t, int> seen;
  for (const auto& response : results->messages()) {
    for (const auto& result : response.results()) ++seen[result.index()];
  }
  EXPECT_EQ(seen.size(), 50u);
  for (const auto& [index, count] : seen) EXPECT_EQ(count, 1) << index;
}

// A message is far below a client's limit, and a client that does not read holds up nothing.
TEST_F(StreamsTest, LargeResultsComeInParts) {
  constexpr int kItems = 7;  // few: TSan is slow with bytes that gRPC's threads wrote
  const std::string name = Create("key", kItems).name();
  std::vector<ItemEnd> ends;
  for (int i = 0; i < kItems; ++i) {
    ends.push_back(Succeed(IdOf(name), i));
    ends.back().result.mutable_complete()->add_choices()->mutable_message()->set_content(
        std::string(50'000, 'x'));
  }
  ASSERT_EQ(End(&store(), std::move(ends)), absl::OkStatus());
  grpc::ClientContext context;
  const auto reader = stub().StreamResults(&context, ResultsOf(name));
  absl::SleepFor(absl::Milliseconds(50));  // does not read
  EXPECT_EQ(Get(name).counts().succeeded(), kItems);
  v1::StreamResultsResponse response;
  int count = 0;
  int num_messages = 0;
  while (reader->Read(&response)) {
    EXPECT_LE(response.ByteSizeLong(), (256u << 10) + 51'000);
    count += response.results_size();
    ++num_messages;
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(count, kItems);
  EXPECT_EQ(num_messages, 2);
}

// ---- the server's end --------------------------------------------------------------------------

TEST_F(StreamsTest, ADrainEndsWhatWouldGoOn) {
  const std::string name = Create("key", 2).name();
  EndItems(name, 0, 1);
  const auto watch = StartWatch(name);
  const auto follow = StartResults(ResultsOf(name, "", /*follow=*/true));
  ASSERT_TRUE(watch->AwaitCount(1));
  ASSERT_TRUE(follow->AwaitCount(1));
  service().StartDrain();
  EXPECT_EQ(Explain(watch->Finish()).reason, "DRAINING");
  EXPECT_EQ(Explain(follow->Finish()).reason, "DRAINING");
  EXPECT_EQ(Explain(StartWatch(name)->Finish()).reason, "DRAINING");
  EXPECT_EQ(Explain(StartResults(ResultsOf(name, "", true))->Finish()).reason, "DRAINING");
  EXPECT_EQ(Read(ResultsOf(name)).size(), 1u);  // what there is may be had still
}

TEST_F(StreamsTest, ClientsThatGoAwayInTheMidstAreForgotten) {
  const std::string name = Create("key", 200).name();
  std::thread changes([&] {
    for (int i = 0; i < 200; ++i) EndItems(name, i, 1);
  });
  for (int i = 0; i < 50; ++i) {
    const auto watch = StartWatch(name);
    const auto follow = StartResults(ResultsOf(name, "", true));
    if (i % 2 == 0) absl::SleepFor(absl::Milliseconds(3));
    watch->Cancel();
    follow->Cancel();
  }
  changes.join();
  Finalize(name);
  EXPECT_EQ(Read(ResultsOf(name)).size(), 200u);
  EXPECT_EQ(Get(name).state(), v1::JOB_STATE_COMPLETED);
}

// Watches that are open while everything goes down.
TEST_F(StreamsTest, TheServerStopsUnderOpenStreams) {
  const std::string name = Create("key", 50).name();
  const auto watch = StartWatch(name);
  const auto follow = StartResults(ResultsOf(name, "", true));
  ASSERT_TRUE(watch->AwaitCount(1));
  const JobId job = IdOf(name);
  for (int i = 0; i < 50; ++i) {  // these commits come while the server stops
    store().StartItems({{.job = job, .index = i, .seed = 1}}, [](const absl::Status&) {});
  }
  Restart();
  EXPECT_FALSE(watch->Finish().ok());
  EXPECT_FALSE(follow->Finish().ok());
}

}  // namespace
}  // namespace latentd
