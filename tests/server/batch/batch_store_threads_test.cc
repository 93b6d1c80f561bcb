// Many threads ask one store at once.
#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using BatchStoreThreadsTest = BatchStoreTest;

constexpr int kNumItems = 60;

// Uploads, runs and finishes a job, an item or a few at a time.
void RunJob(BatchStore* store, const std::string& key) {
  const auto upload = store->OpenUpload("ann", key, MakeSpec());
  ASSERT_TRUE(upload.ok()) << upload.status();
  const JobId job = upload->record.id;
  for (int first = 0; first < kNumItems; first += 10) {
    ASSERT_TRUE(Append(store, job, first, MakeItems(first, 10)).ok());
  }
  ASSERT_TRUE(store->CommitUpload(job, kNumItems, 10).ok());
  std::atomic<int> num_ended = 0;
  for (int i = 0; i < kNumItems; ++i) {
    store->StartItems({{job, i, 1}}, [&, i](const absl::Status& started) {
      EXPECT_TRUE(started.ok()) << started;
      store->EndItems({Succeed(job, i)}, [&](const absl::Status& ended) {
        EXPECT_TRUE(ended.ok()) << ended;
        ++num_ended;
      });
    });
  }
  while (num_ended < kNumItems) std::this_thread::yield();
  const auto all = store->FinalizeSome(job, 1);
  ASSERT_TRUE(all.ok() && *all) << all.status();
}

TEST_F(BatchStoreThreadsTest, JobsSideBySide) {
  std::atomic<bool> done = false;
  std::vector<std::thread> readers;
  for (int i = 0; i < 6; ++i) {  // more than there are connections
    readers.emplace_back([&] {
      while (!done) {
        const auto jobs = store_->ListJobs({}, 1'000'000, 100);
        ASSERT_TRUE(jobs.ok()) << jobs.status();
        for (const JobRecord& record : *jobs) {
          const v1::JobCounts& counts = record.job.counts();
          EXPECT_EQ(counts.total(), counts.pending() + counts.succeeded());
          // Results are as the counts of one moment, or later.
          const auto results = store_->ReadResults(record.id, 0, 1000, 1 << 20);
          ASSERT_TRUE(results.ok()) << results.status();
          EXPECT_GE(std::ssize(*results), counts.succeeded());
          for (int64_t k = 0; k < std::ssize(*results); ++k) {
            EXPECT_EQ((*results)[static_cast<size_t>(k)].sequence, k + 1);
          }
        }
        EXPECT_TRUE(store_->Stats().ok());
        EXPECT_TRUE(store_->UsageOf("ann").ok());
        EXPECT_TRUE(store_->ActiveJobs().ok());
      }
    });
  }
  std::vector<std::thread> writers;
  for (int i = 0; i < 4; ++i) {
    writers.emplace_back([&, i] { RunJob(store_.get(), absl::StrCat("key", i)); });
  }
  for (std::thread& writer : writers) writer.join();
  done = true;
  for (std::thread& reader : readers) reader.join();
  const auto jobs = store_->ListJobs({}, 1'000'000, 100);
  ASSERT_EQ(jobs->size(), 4u);
  for (const JobRecord& record : *jobs) {
    EXPECT_EQ(record.job.state(), v1::JOB_STATE_COMPLETED);
    EXPECT_EQ(record.job.counts().succeeded(), kNumItems);
    EXPECT_EQ(record.job.completion_tokens(), 5 * kNumItems);
    EXPECT_EQ(Results(record.id).size(), static_cast<size_t>(kNumItems));
  }
}

// Of several calls that upload the same, each append is taken once.
TEST_F(BatchStoreThreadsTest, OneUploadByMany) {
  std::atomic<int> num_taken = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      const auto upload = store_->OpenUpload("ann", "key", MakeSpec());
      ASSERT_TRUE(upload.ok()) << upload.status();
      for (int first = 0; first < kNumItems; first += 5) {
        const absl::Status status =
            Append(store_.get(), upload->record.id, first, MakeItems(first, 5));
        EXPECT_TRUE(status.ok() || absl::IsFailedPrecondition(status)) << status;
        num_taken += status.ok() ? 1 : 0;
      }
      const auto job = store_->CommitUpload(upload->record.id, kNumItems, 10);
      EXPECT_TRUE(job.ok()) << job.status();
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(num_taken, kNumItems / 5);
  const auto upload = store_->GetUpload("ann", "key");
  EXPECT_EQ(upload->item_count, kNumItems);
  EXPECT_EQ(Pending(upload->record.id).size(), static_cast<size_t>(kNumItems));
}

// Of several retries with one key, all give the same job.
TEST_F(BatchStoreThreadsTest, OneRetryByMany) {
  const JobId old = NewJob("old", 3000).id;
  ASSERT_TRUE(store_->EndJob(old, v1::JOB_STATE_CANCELLED, "").ok());
  ASSERT_TRUE(*store_->FinalizeSome(old, 3000));
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      const auto retry = store_->RetryJob(old, "ann", "again");
      ASSERT_TRUE(retry.ok()) << retry.status();
      EXPECT_EQ(retry->item_count, 3000);
      EXPECT_EQ(retry->record.job.state(), v1::JOB_STATE_QUEUED);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(store_->ListJobs({}, 1'000'000, 100)->size(), 2u);
}

}  // namespace
}  // namespace latentd
