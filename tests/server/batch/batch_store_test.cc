#include "server/batch/batch_store.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/status.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;

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

TEST_F(BatchStoreTest, EverythingIsThereAfterReopening) {
  const JobId job = NewJob("key", 5).id;
  ASSERT_TRUE(Start(store_.get(), {{job, 0, 11}, {job, 1, 12}, {job, 3, 14}}).ok());
  ASSERT_TRUE(End(store_.get(), {Succeed(job, 1)}).ok());
  const v1::Job before = Get(job);
  Open();
  v1::Job after = Get(job);
  EXPECT_EQ(after.recoveries(), 1);
  EXPECT_GT(after.revision(), before.revision());
  EXPECT_NE(after.etag(), before.etag());
  after.set_recoveries(0);
  after.set_revision(before.revision());
  after.set_etag(before.etag());
  EXPECT_EQ(after.DebugString(), before.DebugString());
  const auto pending = Pending(job);
  ASSERT_THAT(pending, SizeIs(4));
  EXPECT_EQ(pending[0].attempts, 1);  // it ran when the process ended
  EXPECT_EQ(pending[0].seed, 11u);
  EXPECT_EQ(pending[1].index, 2);
  EXPECT_EQ(pending[1].attempts, 0);
  EXPECT_EQ(pending[1].seed, 0u);
  EXPECT_EQ(pending[2].seed, 14u);
  ASSERT_THAT(Results(job), SizeIs(1));
  EXPECT_EQ(store_->Stats()->recoveries, 1);
  const auto active = store_->ActiveJobs();
  ASSERT_TRUE(active.ok());
  ASSERT_THAT(*active, SizeIs(1));
  EXPECT_EQ((*active)[0].id, job);
}

TEST_F(BatchStoreTest, AStartCountsOnlyWhatWasUnderWay) {
  const JobId queued = NewJob("queued", 1).id;
  const JobId ended = NewJob("ended", 1).id;
  ASSERT_TRUE(FinishJob(store_.get(), ended).ok());
  const JobId cancelling = NewJob("cancelling", 1).id;
  ASSERT_TRUE(store_->EndJob(cancelling, v1::JOB_STATE_CANCELLED, "").ok());
  const JobId upload = NewUpload("upload");
  Open();
  EXPECT_EQ(Get(queued).recoveries(), 0);
  EXPECT_EQ(Get(ended).recoveries(), 0);
  EXPECT_EQ(Get(cancelling).recoveries(), 1);
  EXPECT_EQ(Get(upload).recoveries(), 0);
}

TEST_F(BatchStoreTest, ASeedStaysAndAttemptsAddUp) {
  const JobId job = NewJob("key", 2).id;
  const uint64_t seed = 0xFFFF'FFFF'FFFF'FFF1;  // no positive int64
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(Start(store_.get(), {{job, 1, seed}}).ok());
  EXPECT_EQ(Pending(job)[1].attempts, 3);
  EXPECT_EQ(Pending(job)[1].seed, seed);
  ASSERT_TRUE(Return(store_.get(), {{job, 1, seed}}).ok());
  EXPECT_EQ(Pending(job)[1].attempts, 2);
  ASSERT_TRUE(Start(store_.get(), {{job, 1, 99}}).ok());
  EXPECT_EQ(Pending(job)[1].seed, seed);
  ASSERT_TRUE(End(store_.get(), {Succeed(job, 1)}).ok());
  EXPECT_EQ(Results(job)[0].result.attempts(), 3);
  // Of an item with a result, neither changes anything.
  ASSERT_TRUE(Start(store_.get(), {{job, 1, seed}}).ok());
  ASSERT_TRUE(Return(store_.get(), {{job, 1, seed}}).ok());
  ASSERT_TRUE(Return(store_.get(), {{job, 0, seed}}).ok());  // never begun
  EXPECT_EQ(Results(job)[0].result.attempts(), 3);
  EXPECT_EQ(Pending(job)[0].attempts, 0);
}

TEST_F(BatchStoreTest, ASecondEndChangesNothing) {
  const JobId job = NewJob("key", 3).id;
  ASSERT_TRUE(End(store_.get(), {Succeed(job, 1), Fail(job, 1)}).ok());
  const v1::Job before = Get(job);
  ASSERT_TRUE(End(store_.get(), {Fail(job, 1), Succeed(job, 1)}).ok());
  EXPECT_EQ(Get(job).DebugString(), before.DebugString());
  EXPECT_EQ(Get(job).counts().succeeded(), 1);
  EXPECT_EQ(Get(job).counts().failed(), 0);
  ASSERT_THAT(Results(job), SizeIs(1));
  EXPECT_EQ(Results(job)[0].result.state(), v1::ITEM_STATE_SUCCEEDED);
  EXPECT_EQ(store_->Stats()->items_ended[0], 1);
  EXPECT_EQ(store_->Stats()->items_ended[1], 0);
}

TEST_F(BatchStoreTest, WhatIsNoItemIsRefusedAloneAndWhole) {
  const JobId job = NewJob("key", 3).id;
  const JobId upload = NewUpload("upload");
  ASSERT_TRUE(Append(store_.get(), upload, 0, MakeItems(0, 1)).ok());
  const v1::Job before = Get(job);
  ItemEnd running = Succeed(job, 0);
  running.result.set_state(v1::ITEM_STATE_RUNNING);
  for (const std::vector<ItemEnd>& ends :
       std::vector<std::vector<ItemEnd>>{{Succeed(job, 0), Succeed(job, 3)},
                                         {Succeed(job, 0), Succeed(job, -1)},
                                         {Succeed(job, 1), running},
                                         {Succeed(job, 0), Succeed(upload, 0)}}) {
    EXPECT_TRUE(absl::IsInvalidArgument(End(store_.get(), ends)));
  }
  EXPECT_TRUE(absl::IsInvalidArgument(Start(store_.get(), {{job, 0, 1}, {job, 3, 1}})));
  EXPECT_EQ(Get(job).DebugString(), before.DebugString());
  EXPECT_THAT(Pending(job), SizeIs(3));
  EXPECT_EQ(Pending(job)[0].attempts, 0);
  EXPECT_THAT(Results(job), IsEmpty());
  EXPECT_EQ(store_->Stats()->items_ended[0], 0);

  // One that is refused takes none of its group with it.
  absl::Mutex mutex;
  std::vector<bool> ok;
  const auto note = [&](const absl::Status& status) {
    absl::MutexLock lock(&mutex);
    ok.push_back(status.ok());
  };
  store_->EndItems({Succeed(job, 0)}, note);
  store_->EndItems({Succeed(job, 7)}, note);
  ASSERT_TRUE(End(store_.get(), {Succeed(job, 1)}).ok());
  EXPECT_THAT(ok, ::testing::ElementsAre(true, false));
  EXPECT_EQ(Get(job).counts().succeeded(), 2);
}

TEST_F(BatchStoreTest, WhatIsOfAJobThatIsGoneIsPassedOver) {
  const JobId gone = NewJob("gone", 1).id;
  ASSERT_TRUE(FinishJob(store_.get(), gone).ok());
  ASSERT_TRUE(store_->DeleteJob(gone, "").ok());
  const JobId job = NewJob("key", 2).id;
  EXPECT_TRUE(Start(store_.get(), {{gone, 0, 1}, {job, 0, 1}}).ok());
  EXPECT_TRUE(End(store_.get(), {Succeed(gone, 0), Succeed(job, 0)}).ok());
  EXPECT_EQ(Get(job).counts().succeeded(), 1);
  EXPECT_TRUE(absl::IsNotFound(store_->ReadResults(gone, 0, 10, 10).status()));
  EXPECT_TRUE(absl::IsNotFound(store_->ReadPending(gone, 0, 10, 10).status()));
  EXPECT_TRUE(absl::IsNotFound(store_->EndJob(gone, v1::JOB_STATE_FAILED, "").status()));
  EXPECT_TRUE(absl::IsNotFound(store_->FinalizeSome(gone, 10).status()));
  EXPECT_TRUE(absl::IsNotFound(store_->DeleteJob(gone, "")));
  EXPECT_TRUE(absl::IsNotFound(store_->RetryJob(gone, "ann", "again").status()));
}

TEST_F(BatchStoreTest, ReadsAreBounded) {
  const JobId job = NewJob("key", 10).id;
  EXPECT_THAT(*store_->ReadPending(job, 0, 3, 1 << 20), SizeIs(3));
  EXPECT_THAT(*store_->ReadPending(job, 0, 10, 1), SizeIs(1));
  EXPECT_THAT(*store_->ReadPending(job, 0, 10, 9 * 4), SizeIs(4));  // "request 0" has 9 bytes
  EXPECT_THAT(*store_->ReadPending(job, 8, 10, 1 << 20), SizeIs(2));
  EXPECT_THAT(*store_->ReadPending(job, 10, 10, 1 << 20), IsEmpty());
  EXPECT_THAT(*store_->ReadPending(job, 0, 0, 1 << 20), IsEmpty());
  ASSERT_TRUE(FinishJob(store_.get(), job).ok());
  EXPECT_THAT(Results(job, 0, 4), SizeIs(4));
  EXPECT_THAT(*store_->ReadResults(job, 0, 10, 1), SizeIs(1));
  EXPECT_THAT(Results(job, 9), SizeIs(1));
  EXPECT_THAT(Results(job, 10), IsEmpty());
}

// Jobs' rows lie side by side.
TEST_F(BatchStoreTest, JobsKeepApart) {
  std::vector<JobId> jobs;
  for (int i = 0; i < 3; ++i) jobs.push_back(NewJob(absl::StrCat("key", i), 2 + i).id);
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(End(store_.get(), {Succeed(jobs[i], 1)}).ok());
    EXPECT_THAT(Pending(jobs[i]), SizeIs(1 + i));
    EXPECT_THAT(Results(jobs[i]), SizeIs(1));
  }
  ASSERT_TRUE(FinishJob(store_.get(), jobs[1]).ok());
  ASSERT_TRUE(store_->DeleteJob(jobs[1], "").ok());
  ASSERT_TRUE(store_->Purge(absl::InfinitePast()).ok());
  EXPECT_THAT(Pending(jobs[0]), SizeIs(1));
  EXPECT_THAT(Pending(jobs[2]), SizeIs(3));
  EXPECT_THAT(Results(jobs[0]), SizeIs(1));
  EXPECT_THAT(Results(jobs[2]), SizeIs(1));
}

TEST_F(BatchStoreTest, ChangesAreTold) {
  const JobId a = NewJob("a", 2).id;
  const JobId b = NewJob("b", 2).id;
  {
    absl::MutexLock lock(&mutex_);
    changes_.clear();
  }
  ASSERT_TRUE(End(store_.get(), {Succeed(b, 0), Succeed(a, 0), Succeed(b, 1)}).ok());
  ASSERT_TRUE(End(store_.get(), {Succeed(b, 0)}).ok());  // nothing new
  ASSERT_TRUE(Start(store_.get(), {{a, 1, 1}}).ok());
  absl::MutexLock lock(&mutex_);
  EXPECT_THAT(changes_, ::testing::ElementsAre(std::vector<JobId>{a, b}, std::vector<JobId>{a}));
}

TEST_F(BatchStoreTest, ItWritesWhatIsAskedForWhenItEnds) {
  const JobId job = NewJob("key", 500).id;
  absl::Mutex mutex;
  int done = 0;
  for (int i = 0; i < 500; ++i) {
    store_->EndItems({Succeed(job, i)}, [&](const absl::Status& status) {
      absl::MutexLock lock(&mutex);
      done += status.ok() ? 1 : 0;
    });
  }
  Open();
  EXPECT_EQ(done, 500);
  EXPECT_EQ(Get(job).counts().succeeded(), 500);
}

TEST_F(BatchStoreTest, AnotherProcessIsRefused) {
  const auto second = BatchStore::Open({.directory = folder_.path() / "a" / "b"});
  EXPECT_TRUE(absl::IsFailedPrecondition(second.status())) << second.status();
  EXPECT_THAT(std::string(second.status().message()), ::testing::HasSubstr("another process"));
  store_.reset();
  EXPECT_TRUE(BatchStore::Open({.directory = folder_.path() / "a" / "b"}).ok());
}

TEST_F(BatchStoreTest, StatsSayWhatThereIs) {
  NewUpload("upload");
  const JobId old = NewJob("old", 3).id;
  Pass(absl::Seconds(10));
  NewJob("new", 4);
  ASSERT_TRUE(End(store_.get(), {Succeed(old, 0), Fail(old, 1)}).ok());
  absl::StatusOr<StoreStats> stats = store_->Stats();
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_THAT(stats->jobs,
              ::testing::UnorderedElementsAre(::testing::Pair(v1::JOB_STATE_VALIDATING, 1),
                                              ::testing::Pair(v1::JOB_STATE_QUEUED, 2)));
  EXPECT_EQ(stats->items_pending, 5);
  EXPECT_EQ(stats->items_ended[0], 1);
  EXPECT_EQ(stats->items_ended[1], 1);
  EXPECT_EQ(stats->oldest_pending, kStart);
  EXPECT_EQ(stats->earliest_expiry, kStart + absl::Hours(1));
  EXPECT_GT(stats->bytes, 0);
  EXPECT_GT(stats->num_commits, 5);
  EXPECT_GT(stats->commit_time, absl::ZeroDuration());

  ASSERT_TRUE(FinishJob(store_.get(), old).ok());
  stats = store_->Stats();
  EXPECT_EQ(stats->items_pending, 4);
  EXPECT_EQ(stats->oldest_pending, kStart + absl::Seconds(10));
  EXPECT_EQ(stats->earliest_expiry, kStart + absl::Hours(1) + absl::Seconds(10));
}

}  // namespace
}  // namespace latentd
