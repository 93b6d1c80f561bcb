// Random jobs, failures, cancels, drains, restarts, failing disks and losses of power: every item
// ends once, as its job says.
#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "server/batch/batch_runner.h"
#include "server/batch/batch_store.h"
#include "server/status.h"
#include "tests/server/batch/fake_caller.h"
#include "tests/server/batch/fault_vfs.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

// One store, its jobs, and the servers that run it one after the other.
class World {
 public:
  explicit World(uint64_t seed)
      : random_(seed), has_faults_(seed % 2 == 0), caller_(static_cast<int32_t>(Pick(1, 12))) {
    caller_.set_judge([this](const std::string& prompt) { return Judge(prompt); });
    Open();
  }
  ~World() { Close(); }

  void Run() {
    std::atomic<bool> done = false;
    // The engine: answers in no order.
    std::thread engine([&] {
      std::mt19937_64 random(1);
      while (!done) {
        if (!caller_.AnswerOne(random() % 4) && !caller_.AnswerOne()) {
          absl::SleepFor(absl::Microseconds(200));
        }
      }
    });
    for (int i = 0; has_faults_ && i < 8; ++i) NewJob();
    for (int i = 0; i < 40 && !testing::Test::HasFailure(); ++i) {
      if (vfs_->has_failed()) {
        StartAgain();
      } else if (has_faults_ && OneIn(5)) {
        fault_ = static_cast<FaultVfs::Fault>(Pick(1, 4));
        vfs_->FailAt(fault_, Pick(1, 40));
      }
      if (!has_faults_ && OneIn(4)) NewJob();
      if (OneIn(12)) Cancel();
      if (OneIn(10)) {
        caller_.set_capacity(0);
        absl::SleepFor(absl::Milliseconds(3));
        caller_.set_capacity(Pick(1, 12));
      }
      if (!has_faults_ && OneIn(12)) {
        if (OneIn(2)) runner_->StartDrain();
        Close();
        Open();
      }
      absl::SleepFor(absl::Milliseconds(Pick(0, 8)));
    }
    if (has_faults_) {
      // No fault is to come any more.
      if (!vfs_->has_failed()) vfs_->FailAt(FaultVfs::Fault::kNone, 1);
      StartAgain();
    }
    AwaitEnd();
    done = true;
    engine.join();
    for (const auto& [id, job] : jobs_) Check(id, job);
  }

 private:
  struct Job {
    int64_t count;
    v1::JobSpec spec;
    bool cancelled = false;
  };

  int Pick(int low, int high) { return low + static_cast<int>(random_() % (high - low + 1)); }
  bool OneIn(int n) { return Pick(1, n) == 1; }

  // By the kind in the prompt: what it says each time, or now and then.
  absl::Status Judge(const std::string& prompt) {
    const uint64_t draw = std::hash<std::string>()(absl::StrCat(prompt, num_judged_++)) % 100;
    if (absl::StrContains(prompt, "bad")) return MakeBadRequest({{"text", "is bad"}});
    if (absl::StrContains(prompt, "poison") || draw < 3) {
      return MakeError(absl::StatusCode::kUnavailable, "ENGINE_FAILED", "the engine failed");
    }
    if (draw < 5) {
      return MakeError(absl::StatusCode::kUnavailable, "ENGINE_UNAVAILABLE", "not ready");
    }
    return absl::OkStatus();
  }

  void Open() {
    auto store = BatchStore::Open({.directory = folder_->path(),
                                   .vfs = vfs_->name(),
                                   .on_change = [this](const std::vector<JobId>& jobs) {
                                     absl::MutexLock lock(&mutex_);
                                     if (runner_ != nullptr) runner_->OnChange(jobs);
                                   }});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
    auto runner = std::make_unique<BatchRunner>(
        store_.get(), &caller_,
        BatchRunner::Options{.max_running = OneIn(2) ? 0 : Pick(1, 20),
                             .max_running_bytes = OneIn(4) ? 1 : 1 << 20,
                             .max_ahead = Pick(1, 8),
                             .max_ahead_bytes = OneIn(3) ? 1 : 1 << 20,
                             .retry_delay = absl::Milliseconds(Pick(0, 3)),
                             .max_retry_delay = absl::Milliseconds(5)});
    absl::MutexLock lock(&mutex_);
    runner_ = std::move(runner);
  }

  void Close() {
    std::unique_ptr<BatchRunner> runner;
    {
      absl::MutexLock lock(&mutex_);
      runner = std::move(runner_);
    }
    runner.reset();
    EXPECT_EQ(caller_.num_calls(), 0u) << "a call that nobody waits for";
    store_.reset();
  }

  // After the store has failed, or as if it had: with what the disk has.
  void StartAgain() {
    Close();
    if (vfs_->has_failed() && fault_ == FaultVfs::Fault::kPowerLoss) {
      auto folder = std::make_unique<StoreFolder>();
      vfs_->WriteSurvivors(folder_->path(), folder->path(), &random_);
      vfs_ = std::make_unique<FaultVfs>();
      vfs_->Adopt(folder->path());
      folder_ = std::move(folder);
    } else {
      auto vfs = std::make_unique<FaultVfs>();
      vfs->Adopt(folder_->path());
      vfs_ = std::move(vfs);
    }
    Open();
  }

  void NewJob() {
    Job job{.count = Pick(1, 40), .spec = MakeSpec()};
    job.spec.set_priority(Pick(0, 2));
    job.spec.set_max_attempts_per_item(Pick(1, 4));
    job.spec.set_fail_fast(OneIn(5));
    const std::string name = absl::StrCat("job", jobs_.size());
    const auto upload = store_->OpenUpload("ann", name, job.spec);
    ASSERT_TRUE(upload.ok()) << upload.status();
    std::vector<NewItem> items;
    for (int64_t i = 0; i < job.count; ++i) {
      v1::BatchItem item;
      item.set_custom_id(absl::StrCat(name, "-", i));
      const char* kind = OneIn(30) ? "bad" : OneIn(40) ? "poison" : "good";
      item.mutable_complete()->set_text(absl::StrCat(item.custom_id(), " ", kind));
      items.push_back({.custom_id = item.custom_id(), .request = item.SerializeAsString()});
    }
    ASSERT_TRUE(Append(store_.get(), upload->record.id, 0, std::move(items)).ok());
    ASSERT_TRUE(store_->CommitUpload(upload->record.id, job.count, 10).ok());
    jobs_.emplace(upload->record.id, job);
  }

  void Cancel() {
    if (jobs_.empty()) return;
    auto& [id, job] = *std::next(jobs_.begin(), Pick(0, static_cast<int>(jobs_.size()) - 1));
    EXPECT_TRUE(store_->EndJob(id, v1::JOB_STATE_CANCELLED, "").ok() || has_faults_);
    job.cancelled = true;  // perhaps, where the store fails
  }

  void AwaitEnd() {
    for (int i = 0; i < 6000; ++i) {
      const auto jobs = store_->ActiveJobs();
      ASSERT_TRUE(jobs.ok()) << jobs.status();
      if (jobs->empty()) return;
      absl::SleepFor(absl::Milliseconds(5));
    }
    ADD_FAILURE() << "jobs do not come to an end: "
                  << (*store_->ActiveJobs())[0].job.ShortDebugString();
  }

  void Check(JobId id, const Job& job) {
    SCOPED_TRACE(absl::StrCat("job ", id));
    const v1::Job ended = store_->GetJob(id)->job;
    const auto results = store_->ReadResults(id, 0, 1'000'000, int64_t{1} << 40);
    ASSERT_TRUE(results.ok()) << results.status();
    std::map<int64_t, v1::ItemResult> by_index;
    std::map<v1::ItemState, int64_t> counts;
    for (const BatchStore::Result& result : *results) {
      EXPECT_TRUE(by_index.emplace(result.result.index(), result.result).second) << "told twice";
      ++counts[result.result.state()];
    }
    EXPECT_EQ(std::ssize(by_index), job.count);
    EXPECT_EQ(ended.counts().succeeded(), counts[v1::ITEM_STATE_SUCCEEDED]);
    EXPECT_EQ(ended.counts().failed(), counts[v1::ITEM_STATE_FAILED]);
    EXPECT_EQ(ended.counts().cancelled(), counts[v1::ITEM_STATE_CANCELLED]);
    EXPECT_EQ(ended.counts().pending(), 0);
    if (ended.state() == v1::JOB_STATE_COMPLETED) {
      EXPECT_EQ(counts[v1::ITEM_STATE_CANCELLED], 0);
    } else if (ended.state() == v1::JOB_STATE_FAILED) {
      EXPECT_TRUE(job.spec.fail_fast());
      EXPECT_GT(counts[v1::ITEM_STATE_FAILED], 0);
    } else {
      EXPECT_EQ(ended.state(), v1::JOB_STATE_CANCELLED);
      EXPECT_TRUE(job.cancelled);
    }
    for (const auto& [index, result] : by_index) CheckResult(job, result);
  }

  void CheckResult(const Job& job, const v1::ItemResult& result) {
    EXPECT_LE(result.attempts(), job.spec.max_attempts_per_item());
    if (result.state() == v1::ITEM_STATE_SUCCEEDED) {
      EXPECT_GE(result.attempts(), 1);
      EXPECT_EQ(result.complete().choices(0).message().content(),
                absl::StrCat(result.custom_id(), " good!"));
    } else if (result.state() == v1::ITEM_STATE_FAILED) {
      if (result.error().reason() == "ATTEMPTS_EXHAUSTED") {
        EXPECT_EQ(result.attempts(), job.spec.max_attempts_per_item());
      } else {
        EXPECT_EQ(result.error().reason(), "INVALID_FIELD");
      }
    }
  }

  std::mt19937_64 random_;
  const bool has_faults_;
  std::unique_ptr<StoreFolder> folder_ = std::make_unique<StoreFolder>();
  std::unique_ptr<FaultVfs> vfs_ = std::make_unique<FaultVfs>();
  FaultVfs::Fault fault_ = FaultVfs::Fault::kNone;  // that was asked for last
  std::atomic<int> num_judged_ = 0;
  FakeCaller caller_;
  absl::Mutex mutex_;
  std::unique_ptr<BatchStore> store_;
  std::unique_ptr<BatchRunner> runner_;  // changed under mutex_
  std::map<JobId, Job> jobs_;
};

TEST(BatchRunnerRandomTest, EveryItemEndsOnceAsItsJobSays) {
  const char* const is_long = std::getenv("LATENTD_TEST_LONG");
  const int num_worlds = is_long != nullptr && *is_long == '1' ? 200 : 8;
  for (int seed = 1; seed <= num_worlds && !testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(absl::StrCat("world ", seed));
    World(seed).Run();
  }
}

}  // namespace
}  // namespace latentd
