#ifndef LATENTD_TESTS_SERVER_BATCH_STORE_FIXTURE_H_
#define LATENTD_TESTS_SERVER_BATCH_STORE_FIXTURE_H_

#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "gtest/gtest.h"
#include "server/batch/batch_store.h"

namespace latentd {

// A folder that is new, and gone with this.
class StoreFolder {
 public:
  StoreFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "latentd_store_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~StoreFolder() { std::filesystem::remove_all(path_); }
  StoreFolder(const StoreFolder&) = delete;
  StoreFolder& operator=(const StoreFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Calls `begin` with a Done, and waits for it.
template <typename Begin>
absl::Status WaitFor(const Begin& begin) {
  absl::Status result;
  absl::Notification done;
  begin(BatchStore::Done([&](const absl::Status& status) {
    result = status;
    done.Notify();
  }));
  done.WaitForNotification();
  return result;
}

inline absl::Status Append(BatchStore* store, JobId job, int64_t first,
                           std::vector<NewItem> items) {
  return WaitFor([&](auto done) { store->AppendItems(job, first, std::move(items), done); });
}
inline absl::Status Start(BatchStore* store, std::vector<ItemStart> starts) {
  return WaitFor([&](auto done) { store->StartItems(std::move(starts), done); });
}
inline absl::Status Return(BatchStore* store, std::vector<ItemStart> starts) {
  return WaitFor([&](auto done) { store->ReturnItems(std::move(starts), done); });
}
inline absl::Status End(BatchStore* store, std::vector<ItemEnd> ends) {
  return WaitFor([&](auto done) { store->EndItems(std::move(ends), done); });
}

// Item i is "id-i" with the request "request i".
inline NewItem MakeItem(int64_t index) {
  return {.custom_id = absl::StrCat("id-", index), .request = absl::StrCat("request ", index)};
}
inline std::vector<NewItem> MakeItems(int64_t first, int64_t count) {
  std::vector<NewItem> items;
  for (int64_t i = first; i < first + count; ++i) items.push_back(MakeItem(i));
  return items;
}

inline ItemEnd Succeed(JobId job, int64_t index) {
  ItemEnd end{.job = job, .result = {}, .prompt_tokens = 3, .completion_tokens = 5};
  end.result.set_index(index);
  end.result.set_state(v1::ITEM_STATE_SUCCEEDED);
  end.result.mutable_complete()->set_request_id(absl::StrCat("answer ", index));
  return end;
}
inline ItemEnd Fail(JobId job, int64_t index) {
  ItemEnd end{.job = job, .result = {}};
  end.result.set_index(index);
  end.result.set_state(v1::ITEM_STATE_FAILED);
  end.result.mutable_error()->set_reason("INVALID_FIELD");
  return end;
}

inline v1::JobSpec MakeSpec() {
  v1::JobSpec spec;
  spec.mutable_completion_window()->set_seconds(3600);
  spec.mutable_result_ttl()->set_seconds(600);
  (*spec.mutable_metadata())["kind"] = "test";
  (*spec.mutable_metadata())["run"] = "7";
  return spec;
}

// An uploaded and committed job.
inline absl::StatusOr<JobRecord> MakeJob(BatchStore* store, const std::string& key, int64_t count,
                                         const std::string& owner = "ann") {
  absl::StatusOr<BatchStore::Upload> upload = store->OpenUpload(owner, key, MakeSpec());
  if (!upload.ok()) return upload.status();
  const absl::Status status = Append(store, upload->record.id, 0, MakeItems(0, count));
  if (!status.ok()) return status;
  return store->CommitUpload(upload->record.id, count, 10);
}

// Ends all items that have no result with a success, and the job.
inline absl::Status FinishJob(BatchStore* store, JobId job) {
  absl::StatusOr<std::vector<PendingItem>> items =
      store->ReadPending(job, 0, 1'000'000, int64_t{1} << 40);
  if (!items.ok()) return items.status();
  std::vector<ItemEnd> ends;
  for (const PendingItem& item : *items) ends.push_back(Succeed(job, item.index));
  absl::Status status = End(store, std::move(ends));
  if (!status.ok()) return status;
  return store->FinalizeSome(job, 1'000'000).status();
}

inline const absl::Time kStart = absl::FromUnixSeconds(1'700'000'000);

// A store whose clock the test moves.
class BatchStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { Open(); }

  void Open() {
    store_.reset();
    absl::StatusOr<std::unique_ptr<BatchStore>> store =
        BatchStore::Open({.directory = folder_.path() / "a" / "b",
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

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BATCH_STORE_FIXTURE_H_
