// Random things asked of a store, and the same of a model of it. LATENTD_TEST_LONG=1: more of them.
#include <cstdlib>
#include <random>
#include <set>

#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"
#include "tests/server/batch/fault_vfs.h"
#include "tests/server/batch/store_fixture.h"
#include "tests/server/batch/store_model.h"

namespace latentd {
namespace {

class StorePropertyTest : public ::testing::TestWithParam<int> {
 protected:
  void Open() {
    store_.reset();
    absl::StatusOr<std::unique_ptr<BatchStore>> store =
        BatchStore::Open({.directory = folder_.path(),
                          .vfs = vfs_.name(),
                          .on_change =
                              [this](const std::vector<JobId>& jobs) {
                                absl::MutexLock lock(&mutex_);
                                changed_.insert(jobs.begin(), jobs.end());
                              },
                          .now =
                              [this] {
                                absl::MutexLock lock(&mutex_);
                                return now_;
                              },
                          .checkpoint_pages = 30});
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }

  // Asks both, and compares the answers.
  void AskBoth(const StoreOp& op) {
    const absl::StatusCode expected = model_.Apply(op);
    {
      absl::MutexLock lock(&mutex_);
      now_ = model_.now();
    }
    const absl::Status status =
        WaitFor([&](auto done) { Ask(op, model_.now(), store_.get(), done); });
    ASSERT_EQ(status.code(), expected) << op.kind << " of job " << op.job << ": " << status;
  }

  // What has changed for a reader was told, with another etag.
  void CompareChanges(const std::map<JobId, std::string>& before,
                      const std::map<JobId, std::string>& etags) {
    absl::MutexLock lock(&mutex_);
    for (const auto& [id, text] : model_.DescribeJobs()) {
      const auto found = before.find(id);
      if (found == before.end() ||
          found->second.substr(0, found->second.find('\n')) == text.substr(0, text.find('\n'))) {
        continue;
      }
      EXPECT_TRUE(changed_.contains(id)) << text;
      EXPECT_NE(store_->GetJob(id)->job.etag(), etags.at(id)) << text;
    }
    for (const auto& [id, text] : before) {
      EXPECT_TRUE(changed_.contains(id) || model_.DescribeJobs().contains(id)) << text;
    }
    changed_.clear();
  }

  std::map<JobId, std::string> Etags() {
    std::map<JobId, std::string> etags;
    for (const auto& [id, text] : model_.DescribeJobs()) {
      etags[id] = store_->GetJob(id)->job.etag();
    }
    return etags;
  }

  StoreFolder folder_;
  FaultVfs vfs_;
  StoreModel model_;
  absl::Mutex mutex_;
  absl::Time now_ ABSL_GUARDED_BY(mutex_) = model_.now();
  std::set<JobId> changed_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<BatchStore> store_;
};

TEST_P(StorePropertyTest, AsTheModel) {
  std::mt19937_64 random(static_cast<uint64_t>(GetParam()));
  const int num_ops = std::getenv("LATENTD_TEST_LONG") != nullptr ? 20'000 : 300;
  Open();
  for (int i = 0; i < num_ops; ++i) {
    SCOPED_TRACE(i);
    const auto before = model_.DescribeJobs();
    const auto etags = Etags();
    AskBoth(model_.MakeOp(&random));
    if (HasFatalFailure()) return;
    CompareChanges(before, etags);
    if (i % 97 == 96) {
      Open();
      model_.Reopen();
    }
    if (i % 10 != 0) continue;
    ASSERT_EQ(Describe(*store_), model_.Describe());
    ASSERT_FALSE(HasFailure());
  }
  ASSERT_EQ(Describe(*store_), model_.Describe());
}

INSTANTIATE_TEST_SUITE_P(Seeds, StorePropertyTest, ::testing::Range(1, 5));

}  // namespace
}  // namespace latentd
