// Uploads, and what is done to jobs as a whole.
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/batch/item_chain.h"
#include "server/batch/sqlite.h"
#include "server/status.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

using BatchStoreJobsTest = BatchStoreTest;

std::string ChainOver(const std::vector<NewItem>& items) {
  ItemChain chain;
  for (const NewItem& item : items) chain.Add(item.request);
  return chain.value();
}

std::vector<std::string> Keys(const std::vector<JobRecord>& jobs) {
  std::vector<std::string> keys;
  for (const JobRecord& job : jobs) keys.push_back(job.job.request_id());
  return keys;
}

// ---- uploads ---------------------------------------------------------------------------------

TEST_F(BatchStoreJobsTest, AnUploadGoesOn) {
  const JobId job = NewUpload("key");
  ASSERT_TRUE(Append(store_.get(), job, 0, MakeItems(0, 7)).ok());
  Open();
  const auto found = store_->GetUpload("ann", "key");
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->item_count, 7);
  EXPECT_EQ(found->sha256, ChainOver(MakeItems(0, 7)));
  const auto again = store_->OpenUpload("ann", "key", MakeSpec());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE(again->is_new);
  EXPECT_EQ(again->record.id, job);
  EXPECT_EQ(again->item_count, 7);
  for (const int64_t count : {0, 3, 7}) {
    EXPECT_EQ(*store_->ChainOf(job, count), ChainOver(MakeItems(0, count)));
  }
  EXPECT_TRUE(absl::IsOutOfRange(store_->ChainOf(job, 8).status()));
  for (const int64_t first : {0, 6, 8}) {
    const absl::Status status = Append(store_.get(), job, first, MakeItems(7, 1));
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(ErrorReason(status), "UPLOAD_CONFLICT");
  }
  ASSERT_TRUE(Append(store_.get(), job, 7, MakeItems(7, 1)).ok());
  EXPECT_EQ(store_->GetUpload("ann", "key")->sha256, ChainOver(MakeItems(0, 8)));
}

TEST_F(BatchStoreJobsTest, AKeyIsItsOwnersAndItsSpecs) {
  const JobId job = NewUpload("key");
  EXPECT_NE(NewUpload("key", "bob"), job);
  EXPECT_NE(NewUpload("other"), job);
  EXPECT_TRUE(absl::IsNotFound(store_->GetUpload("cid", "key").status()));
  v1::JobSpec spec = MakeSpec();
  spec.set_priority(1);
  EXPECT_TRUE(absl::IsAlreadyExists(store_->OpenUpload("ann", "key", spec).status()));
  const JobRecord made = NewJob("made", 2);
  const auto again = store_->OpenUpload("ann", "made", MakeSpec());
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->record.job.DebugString(), made.job.DebugString());
  EXPECT_EQ(again->item_count, 2);
}

TEST_F(BatchStoreJobsTest, ACommitChecksTheCount) {
  const JobId job = NewUpload("key");
  EXPECT_TRUE(absl::IsInvalidArgument(store_->CommitUpload(job, 0, 10).status()));
  ASSERT_TRUE(Append(store_.get(), job, 0, MakeItems(0, 3)).ok());
  for (const int64_t count : {-1, 0, 2, 4}) {
    const absl::Status status = store_->CommitUpload(job, count, 10).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr("commit.item_count"));
  }
  const auto made = store_->CommitUpload(job, 3, 10);
  ASSERT_TRUE(made.ok()) << made.status();
  const auto again = store_->CommitUpload(job, 3, 10);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->job.DebugString(), made->job.DebugString());
  EXPECT_TRUE(absl::IsInvalidArgument(store_->CommitUpload(job, 2, 10).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(Append(store_.get(), job, 3, MakeItems(3, 1))));
  EXPECT_TRUE(store_->AbandonUpload(job).ok());  // it is none any more
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_QUEUED);
}

TEST_F(BatchStoreJobsTest, DuplicatesAreNamed) {
  const JobId job = NewUpload("key");
  std::vector<NewItem> items = MakeItems(0, 6);
  items[3].custom_id = "id-0";
  items[5].custom_id = "id-1";
  items[4].custom_id = "id-0";
  ASSERT_TRUE(Append(store_.get(), job, 0, items).ok());
  const auto duplicates = store_->FindDuplicates(job, 10);
  ASSERT_TRUE(duplicates.ok()) << duplicates.status();
  ASSERT_THAT(*duplicates, SizeIs(3));
  EXPECT_EQ((*duplicates)[0].index, 3);
  EXPECT_EQ((*duplicates)[0].first_index, 0);
  EXPECT_EQ((*duplicates)[0].custom_id, "id-0");
  EXPECT_EQ((*duplicates)[1].index, 4);
  EXPECT_EQ((*duplicates)[1].first_index, 0);
  EXPECT_EQ((*duplicates)[2].index, 5);
  EXPECT_EQ((*duplicates)[2].first_index, 1);
  EXPECT_THAT(*store_->FindDuplicates(job, 2), SizeIs(2));
  const absl::Status status = store_->CommitUpload(job, 6, 2).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("items[3].custom_id"));
  EXPECT_THAT(std::string(status.message()), HasSubstr("items[4].custom_id"));
  EXPECT_EQ(Get(job).state(), v1::JOB_STATE_VALIDATING);
}

TEST_F(BatchStoreJobsTest, AnAbandonedUploadIsGone) {
  const JobId job = NewUpload("key");
  ASSERT_TRUE(Append(store_.get(), job, 0, MakeItems(0, 3)).ok());
  ASSERT_TRUE(store_->AbandonUpload(job).ok());
  ASSERT_TRUE(store_->AbandonUpload(job).ok());
  EXPECT_TRUE(absl::IsNotFound(store_->GetUpload("ann", "key").status()));
  EXPECT_TRUE(absl::IsNotFound(Append(store_.get(), job, 3, MakeItems(3, 1))));
  EXPECT_TRUE(absl::IsNotFound(store_->CommitUpload(job, 3, 10).status()));
  const JobId next = NewUpload("key");
  EXPECT_GT(next, job);
  EXPECT_EQ(store_->GetUpload("ann", "key")->item_count, 0);
}

// ---- jobs ------------------------------------------------------------------------------------

TEST_F(BatchStoreJobsTest, JobsAreListedNewestFirst) {
  for (int i = 0; i < 5; ++i) NewJob(absl::StrCat("a", i), 1);
  NewJob("b0", 1, "bob");
  NewUpload("upload");
  const JobId third = store_->GetUpload("ann", "a2")->record.id;
  ASSERT_TRUE(FinishJob(store_.get(), third).ok());
  const JobId end = 1'000'000;
  EXPECT_THAT(Keys(*store_->ListJobs({}, end, 10)),
              ElementsAre("b0", "a4", "a3", "a2", "a1", "a0"));
  EXPECT_THAT(Keys(*store_->ListJobs({}, end, 2)), ElementsAre("b0", "a4"));
  EXPECT_THAT(Keys(*store_->ListJobs({}, third, 10)), ElementsAre("a1", "a0"));
  EXPECT_THAT(Keys(*store_->ListJobs({.owner = "bob"}, end, 10)), ElementsAre("b0"));
  EXPECT_THAT(Keys(*store_->ListJobs({.states = {v1::JOB_STATE_COMPLETED}}, end, 10)),
              ElementsAre("a2"));
  EXPECT_THAT(Keys(*store_->ListJobs(
                  {.owner = "ann", .states = {v1::JOB_STATE_VALIDATING, v1::JOB_STATE_COMPLETED}},
                  end, 10)),
              ElementsAre("upload", "a2"));
  EXPECT_THAT(*store_->ListJobs({.metadata = {{"kind", "test"}, {"run", "7"}}}, end, 10),
              SizeIs(6));
  EXPECT_THAT(*store_->ListJobs({.metadata = {{"kind", "test"}, {"run", "8"}}}, end, 10),
              IsEmpty());
  EXPECT_THAT(*store_->ListJobs({.metadata = {{"none", ""}}}, end, 10), IsEmpty());
  EXPECT_THAT(Keys(*store_->ActiveJobs()), ElementsAre("a0", "a1", "a3", "a4", "b0"));
}

TEST_F(BatchStoreJobsTest, ActiveJobsAreInTheOrderOfTheirCommits) {
  const JobId first = NewUpload("begun first");
  ASSERT_TRUE(Append(store_.get(), first, 0, MakeItems(0, 1)).ok());
  NewJob("committed first", 1);
  Pass(absl::Seconds(1));
  ASSERT_TRUE(store_->CommitUpload(first, 1, 1).ok());
  EXPECT_THAT(Keys(*store_->ActiveJobs()), ElementsAre("committed first", "begun first"));
}

TEST_F(BatchStoreJobsTest, JobsAreFoundByName) {
  const JobRecord job = NewJob("key", 1);
  EXPECT_EQ(store_->GetJob(job.job.name())->id, job.id);
  EXPECT_EQ(store_->GetJob(job.job.name())->owner, "ann");
  const absl::Status none = store_->GetJob("jobs/00").status();
  EXPECT_TRUE(absl::IsNotFound(none));
  EXPECT_EQ(ErrorReason(none), "JOB_NOT_FOUND");
}

TEST_F(BatchStoreJobsTest, UsageIsOfWhatHasNotEnded) {
  NewJob("other", 9, "bob");
  const JobId job = NewJob("job", 5).id;
  const JobId upload = NewUpload("upload");
  ASSERT_TRUE(Append(store_.get(), upload, 0, MakeItems(0, 3)).ok());
  ASSERT_TRUE(End(store_.get(), {Succeed(job, 0)}).ok());
  EXPECT_EQ(store_->UsageOf("ann")->jobs, 2);
  EXPECT_EQ(store_->UsageOf("ann")->items, 7);
  ASSERT_TRUE(FinishJob(store_.get(), job).ok());
  EXPECT_EQ(store_->UsageOf("ann")->jobs, 1);
  EXPECT_EQ(store_->UsageOf("ann")->items, 3);
  EXPECT_EQ(store_->UsageOf("nobody")->jobs, 0);
}

struct End {
  v1::JobState end_state;
  v1::JobState on_the_way;
  v1::ItemState item_state;
  std::string reason;
};

class EndJobTest : public BatchStoreTest, public ::testing::WithParamInterface<End> {};

TEST_P(EndJobTest, WhatIsFinishedStays) {
  const End& end = GetParam();
  const JobId job = NewJob("key", 5000).id;
  ASSERT_TRUE(Start(store_.get(), {{job, 1, 1}, {job, 2, 2}, {job, 4000, 3}}).ok());
  ASSERT_TRUE(latentd::End(store_.get(), {Succeed(job, 1)}).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->FinalizeSome(job, 10).status()));
  Pass(absl::Seconds(5));
  const auto ended = store_->EndJob(job, end.end_state, "because");
  ASSERT_TRUE(ended.ok()) << ended.status();
  EXPECT_EQ(ended->job.state(), end.on_the_way);
  EXPECT_EQ(ended->end_state, end.end_state);
  EXPECT_EQ(ended->job.state_reason(), "because");
  EXPECT_EQ(ended->job.finalize_time().seconds(), absl::ToUnixSeconds(kStart) + 5);
  // The first end stays.
  const auto second = store_->EndJob(job, v1::JOB_STATE_CANCELLED, "another");
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(second->job.DebugString(), ended->job.DebugString());
  // What still ran ends as it does.
  ASSERT_TRUE(latentd::End(store_.get(), {Succeed(job, 2)}).ok());
  EXPECT_EQ(Get(job).state(), end.on_the_way);

  EXPECT_FALSE(*store_->FinalizeSome(job, 10));
  EXPECT_EQ(Get(job).counts().pending(), 4988);
  Open();  // and it goes on after a crash
  EXPECT_FALSE(*store_->FinalizeSome(job, 3000));
  EXPECT_TRUE(*store_->FinalizeSome(job, 3000));
  EXPECT_TRUE(*store_->FinalizeSome(job, 1));
  const v1::Job now = Get(job);
  EXPECT_EQ(now.state(), end.end_state);
  EXPECT_EQ(now.counts().pending(), 0);
  EXPECT_EQ(now.counts().succeeded(), 2);
  EXPECT_EQ(
      end.item_state == v1::ITEM_STATE_EXPIRED ? now.counts().expired() : now.counts().cancelled(),
      4998);
  EXPECT_THAT(*store_->ReadPending(job, 0, 10, 1 << 20), IsEmpty());
  const auto results = store_->ReadResults(job, 0, 10'000, 1 << 30);
  ASSERT_TRUE(results.ok()) << results.status();
  ASSERT_THAT(*results, SizeIs(5000));
  EXPECT_EQ((*results)[2].result.index(), 0);
  EXPECT_EQ((*results)[2].result.state(), end.item_state);
  EXPECT_EQ((*results)[2].result.error().reason(), end.reason);
  EXPECT_NE((*results)[2].result.error().code(), 0);
  EXPECT_EQ((*results)[2].result.custom_id(), "id-0");
  EXPECT_EQ((*results)[4000].result.index(), 4000);
  EXPECT_EQ((*results)[4000].result.attempts(), 1);
  // Nothing comes after the end.
  ASSERT_TRUE(latentd::End(store_.get(), {Succeed(job, 7)}).ok());
  EXPECT_EQ(Get(job).DebugString(), now.DebugString());
}

INSTANTIATE_TEST_SUITE_P(Ends, EndJobTest,
                         ::testing::Values(End{v1::JOB_STATE_CANCELLED, v1::JOB_STATE_CANCELLING,
                                               v1::ITEM_STATE_CANCELLED, "JOB_CANCELLED"},
                                           End{v1::JOB_STATE_FAILED, v1::JOB_STATE_FINALIZING,
                                               v1::ITEM_STATE_CANCELLED, "JOB_FAILED"},
                                           End{v1::JOB_STATE_EXPIRED, v1::JOB_STATE_FINALIZING,
                                               v1::ITEM_STATE_EXPIRED, "JOB_EXPIRED"}));

TEST_F(BatchStoreJobsTest, AnUploadCannotEnd) {
  const JobId job = NewUpload("key");
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->EndJob(job, v1::JOB_STATE_FAILED, "").status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->FinalizeSome(job, 1).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(store_->DeleteJob(job, "")));
}

TEST_F(BatchStoreJobsTest, ADeleteWantsTheEndAndTheEtag) {
  const JobId job = NewJob("key", 3).id;
  const std::string early = Get(job).etag();
  absl::Status status = store_->DeleteJob(job, early);
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ErrorReason(status), "JOB_NOT_ENDED");
  ASSERT_TRUE(FinishJob(store_.get(), job).ok());
  status = store_->DeleteJob(job, early);
  EXPECT_TRUE(absl::IsAborted(status)) << status;
  ASSERT_TRUE(store_->DeleteJob(job, Get(job).etag()).ok());
  EXPECT_TRUE(absl::IsNotFound(store_->GetJob(job).status()));
  EXPECT_NE(NewUpload("key"), job);  // the key is free, the id is not
}

TEST_F(BatchStoreJobsTest, APurgeTakesWhatIsDueAndAllOfIt) {
  const JobId job = NewJob("job", 3000).id;
  ASSERT_TRUE(FinishJob(store_.get(), job).ok());
  const JobId running = NewJob("running", 3).id;
  const JobId upload = NewUpload("upload");
  ASSERT_TRUE(Append(store_.get(), upload, 0, MakeItems(0, 3)).ok());
  EXPECT_EQ(*store_->Purge(kStart), 0);
  Pass(absl::Seconds(599));
  EXPECT_EQ(*store_->Purge(kStart), 0);
  Pass(absl::Seconds(1));
  EXPECT_EQ(*store_->Purge(kStart), 1);
  EXPECT_TRUE(absl::IsNotFound(store_->GetJob(job).status()));
  EXPECT_EQ(*store_->Purge(kStart + absl::Seconds(1)), 1);
  EXPECT_TRUE(absl::IsNotFound(store_->GetJob(upload).status()));
  EXPECT_EQ(Get(running).counts().pending(), 3);
  const std::string file = (folder_.path() / "a" / "b" / "batch.db").string();
  const auto db = SqliteConnection::Open(file, "", SqliteConnection::Mode::kRead);
  ASSERT_TRUE(db.ok());
  EXPECT_EQ(*(*db)->Number("SELECT count(*) FROM items"), 3);
  EXPECT_EQ(*(*db)->Number("SELECT count(*) FROM progress"), 0);
  EXPECT_EQ(*(*db)->Number("SELECT count(*) FROM results"), 0);
  EXPECT_EQ(*(*db)->Number("SELECT count(*) FROM deleted"), 0);
}

// ---- retries ---------------------------------------------------------------------------------

TEST_F(BatchStoreJobsTest, ARetryHasWhatHasNoSuccess) {
  const JobRecord old = NewJob("old", 3500);
  absl::Status status = store_->RetryJob(old.id, "ann", "again").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  std::vector<ItemEnd> ends;
  for (int i = 0; i < 3500; i += 2)
    ends.push_back(i % 4 == 0 ? Fail(old.id, i) : Succeed(old.id, i));
  ASSERT_TRUE(latentd::End(store_.get(), std::move(ends)).ok());
  ASSERT_TRUE(store_->EndJob(old.id, v1::JOB_STATE_CANCELLED, "").ok());
  ASSERT_TRUE(*store_->FinalizeSome(old.id, 5000));
  Pass(absl::Seconds(9));
  const auto retry = store_->RetryJob(old.id, "ann", "again");
  ASSERT_TRUE(retry.ok()) << retry.status();
  EXPECT_TRUE(retry->is_new);
  const v1::Job& job = retry->record.job;
  EXPECT_EQ(job.state(), v1::JOB_STATE_QUEUED);
  EXPECT_EQ(job.retry_of(), old.job.name());
  EXPECT_EQ(job.request_id(), "again");
  EXPECT_EQ(job.spec().DebugString(), old.job.spec().DebugString());
  EXPECT_EQ(job.expire_time().seconds(), absl::ToUnixSeconds(kStart) + 9 + 3600);
  EXPECT_EQ(job.counts().pending(), 3500 - 875);
  std::vector<NewItem> expected;
  for (int i = 0; i < 3500; ++i) {
    if (i % 4 != 2) expected.push_back(MakeItem(i));
  }
  EXPECT_EQ(retry->sha256, ChainOver(expected));
  const auto items = store_->ReadPending(retry->record.id, 0, 5000, 1 << 30);
  ASSERT_THAT(*items, SizeIs(expected.size()));
  for (size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ((*items)[i].custom_id, expected[i].custom_id);
    EXPECT_EQ((*items)[i].request, expected[i].request);
    EXPECT_EQ((*items)[i].attempts, 0);
  }
  const auto again = store_->RetryJob(old.id, "ann", "again");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_FALSE(again->is_new);
  EXPECT_EQ(again->record.job.DebugString(), job.DebugString());
  EXPECT_TRUE(absl::IsAlreadyExists(store_->OpenUpload("ann", "again", MakeSpec()).status()));
  EXPECT_TRUE(absl::IsAlreadyExists(store_->RetryJob(old.id, "ann", "old").status()));
  EXPECT_TRUE(store_->RetryJob(old.id, "ann", "third").ok());
  // It needs the old one no more.
  ASSERT_TRUE(store_->DeleteJob(old.id, "").ok());
  ASSERT_TRUE(store_->Purge(absl::InfinitePast()).ok());
  EXPECT_THAT(*store_->ReadPending(retry->record.id, 0, 5000, 1 << 30), SizeIs(expected.size()));
}

TEST_F(BatchStoreJobsTest, ASuccessHasNothingToRetry) {
  const JobId job = NewJob("key", 3).id;
  ASSERT_TRUE(FinishJob(store_.get(), job).ok());
  const absl::Status status = store_->RetryJob(job, "ann", "again").status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_EQ(ErrorReason(status), "NOTHING_TO_RETRY");
}

}  // namespace
}  // namespace latentd
