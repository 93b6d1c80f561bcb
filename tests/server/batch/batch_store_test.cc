#include "server/batch/batch_store.h"

#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/batch/item_chain.h"
#include "server/status.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

const absl::Time kStart = absl::FromUnixSeconds(1'700'000'000);

class BatchStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }

  void Open() {
    store_.reset();
    absl::StatusOr<std::unique_ptr<BatchStore>> store =
        BatchStore::Open({.directory = folder_.path() / "a" / "b",
                          .vfs = "",
                          .on_change =
                              [this](const std::vector<JobId>& jobs) {
                                absl::MutexLock lock(&mutex_);
                                changes_.push_back(jobs);
                              },
                          .now =
                              [this] {
                                absl::MutexLock lock(&mutex_);
                                return now_;
                              }});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  JobId NewUpload(const std::string& key, const std::string& owner = "ann") {
    const auto upload = store_->OpenUpload(owner, key, MakeSpec());
    EXPECT_TRUE(upload.ok()) << upload.status();
    return upload->record.id;
  }
  JobRecord NewJob(const std::string& key, int64_t count, const std::string& owner = "ann") {
    const auto job = MakeJob(store_.get(), key, count, owner);
    EXPECT_TRUE(job.ok()) << job.status();
    return *job;
  }
  v1::Job Get(JobId job) {
    const auto record = store_->GetJob(job);
    EXPECT_TRUE(record.ok()) << record.status();
    return record->job;
  }
  std::vector<BatchStore::Result> Results(JobId job, int64_t after = 0, int limit = 1000) {
    const auto results = store_->ReadResults(job, after, limit, 1 << 20);
    EXPECT_TRUE(results.ok()) << results.status();
    return *results;
  }
  std::vector<PendingItem> Pending(JobId job, int64_t first = 0) {
    const auto items = store_->ReadPending(job, first, 1000, 1 << 20);
    EXPECT_TRUE(items.ok()) << items.status();
    return *items;
  }
  void Pass(absl::Duration time) {
    absl::MutexLock lock(&mutex_);
    now_ += time;
  }

  StoreFolder folder_;
  absl::Mutex mutex_;
  absl::Time now_ ABSL_GUARDED_BY(mutex_) = kStart;
  std::vector<std::vector<JobId>> changes_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<BatchStore> store_;
};

TEST_F(BatchStoreTest, AJobFromUploadToEnd) {
  const auto upload = store_->OpenUpload("ann", "key", MakeSpec());
  ASSERT_TRUE(upload.ok()) << upload.status();
  EXPECT_TRUE(upload->is_new);
  const JobId id = upload->record.id;
  EXPECT_THAT(upload->record.job.name(), ::testing::MatchesRegex("jobs/[0-9a-f]{32}"));
  EXPECT_EQ(upload->record.job.state(), v1::JOB_STATE_VALIDATING);
  ASSERT_TRUE(Append(store_.get(), id, 0, MakeItems(0, 2)).ok());
  ASSERT_TRUE(Append(store_.get(), id, 2, MakeItems(2, 1)).ok());
  const auto job = store_->CommitUpload(id, 3, 10);
  ASSERT_TRUE(job.ok()) << job.status();
  EXPECT_EQ(job->job.state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(job->job.counts().pending(), 3);
  EXPECT_EQ(job->job.create_time().seconds(), absl::ToUnixSeconds(kStart));
  EXPECT_EQ(job->job.expire_time().seconds(), absl::ToUnixSeconds(kStart) + 3600);
  EXPECT_FALSE(job->job.has_start_time());

  Pass(absl::Seconds(1));
  ASSERT_TRUE(Start(store_.get(), {{id, 0, 11}, {id, 2, 13}}).ok());
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_IN_PROGRESS);
  EXPECT_EQ(Get(id).start_time().seconds(), absl::ToUnixSeconds(kStart) + 1);
  ASSERT_TRUE(End(store_.get(), {Succeed(id, 2), Fail(id, 0)}).ok());
  v1::Job now = Get(id);
  EXPECT_EQ(now.counts().succeeded(), 1);
  EXPECT_EQ(now.counts().failed(), 1);
  EXPECT_EQ(now.counts().pending(), 1);
  EXPECT_EQ(now.prompt_tokens(), 3);
  EXPECT_EQ(now.completion_tokens(), 5);
  const auto pending = Pending(id);
  ASSERT_THAT(pending, SizeIs(1));
  EXPECT_EQ(pending[0].index, 1);
  EXPECT_EQ(pending[0].custom_id, "id-1");
  EXPECT_EQ(pending[0].request, "request 1");

  Pass(absl::Seconds(1));
  ASSERT_TRUE(End(store_.get(), {Succeed(id, 1)}).ok());
  EXPECT_EQ(Get(id).state(), v1::JOB_STATE_FINALIZING);
  const auto all = store_->FinalizeSome(id, 1);
  ASSERT_TRUE(all.ok()) << all.status();
  EXPECT_TRUE(*all);
  now = Get(id);
  EXPECT_EQ(now.state(), v1::JOB_STATE_COMPLETED);
  EXPECT_EQ(now.end_time().seconds(), absl::ToUnixSeconds(kStart) + 2);
  EXPECT_EQ(now.purge_time().seconds(), absl::ToUnixSeconds(kStart) + 602);

  const auto results = Results(id);
  ASSERT_THAT(results, SizeIs(3));
  EXPECT_EQ(results[0].sequence, 1);
  EXPECT_EQ(results[0].result.index(), 2);
  EXPECT_EQ(results[0].result.custom_id(), "id-2");
  EXPECT_EQ(results[0].result.attempts(), 1);
  EXPECT_EQ(results[0].result.complete().request_id(), "answer 2");
  EXPECT_EQ(results[1].result.index(), 0);
  EXPECT_EQ(results[1].result.state(), v1::ITEM_STATE_FAILED);
  EXPECT_EQ(results[1].result.error().reason(), "INVALID_FIELD");
  EXPECT_EQ(results[2].result.index(), 1);
  EXPECT_EQ(results[2].result.attempts(), 0);
  EXPECT_THAT(Results(id, results[1].sequence), SizeIs(1));
}

}  // namespace
}  // namespace latentd
