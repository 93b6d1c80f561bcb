// Disks that fail and power that is lost, again and again, under a store that is always busy: what
// it said is there, in whole, and nothing else but whole operations that it had not answered.
// LATENTD_TEST_LONG=1: many more.
#include <cstdlib>
#include <filesystem>
#include <random>

#include "gtest/gtest.h"
#include "server/status.h"
#include "tests/server/batch/fault_vfs.h"
#include "tests/server/batch/store_driver.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

using Fault = FaultVfs::Fault;

class StoreFaultsTest : public ::testing::TestWithParam<int> {
 protected:
  absl::StatusOr<std::unique_ptr<BatchStore>> Open() {
    return BatchStore::Open({.directory = folder_->path(),
                             .vfs = vfs_->name(),
                             .now = [this] { return driver_->now(); },
                             .checkpoint_pages = 40});
  }

  // One life of a store. `fault` comes at the `calls`-th write or sync, at the latest at the end.
  void Live(Fault fault, int64_t calls) {
    vfs_->FailAt(fault, calls);
    driver_ = std::make_unique<StoreDriver>(seed_, point_, nullptr);
    absl::StatusOr<std::unique_ptr<BatchStore>> store = Open();
    ++num_opened_;
    if (store.ok()) {
      Find(**store);
      if (HasFatalFailure()) return;
      driver_ = std::make_unique<StoreDriver>(seed_, point_, nullptr);
      driver_->Run(num_ops_, store->get());
      ASSERT_TRUE(driver_->wrong().empty()) << driver_->wrong()[0];
      num_known_ = driver_->num_known();
      num_asked_ = driver_->num_asked();
      if (driver_->has_failed() && fault != Fault::kPowerLoss) CheckThatItStopped(**store);
      if (fault == Fault::kPowerLoss && !vfs_->has_failed()) vfs_->FailAt(fault, 1);
    } else {
      ASSERT_TRUE(vfs_->has_failed()) << store.status();
      ASSERT_TRUE(absl::IsUnavailable(store.status())) << store.status();
    }
    if (store.ok()) {
      store->reset();
      if (vfs_->has_failed() && fault != Fault::kPowerLoss) {
        EXPECT_EQ(vfs_->calls_after_failure(), 0);
      }
    }
    if (fault == Fault::kPowerLoss) LosePower();
  }

  // Which point this store, just opened, is at.
  void Find(const BatchStore& store) {
    const std::string described = Describe(store);
    const std::optional<StorePoint> found =
        FindPoint(seed_, point_, num_known_, num_asked_, num_opened_, described);
    ASSERT_TRUE(found.has_value()) << "between " << num_known_ << " and " << num_asked_ << ":\n"
                                   << described;
    point_ = *found;
    num_known_ = num_asked_ = point_.num_ops;
    num_opened_ = 0;
  }

  // It takes nothing more and writes nothing more, but is read as it was.
  void CheckThatItStopped(BatchStore& store) {
    EXPECT_TRUE(FindPoint(seed_, point_, num_known_, num_asked_, 0, Describe(store)).has_value());
    for (const absl::Status& status :
         {store.OpenUpload("ann", "another", MakeSpec()).status(), Append(&store, 1, 0, {}),
          Start(&store, {}), Return(&store, {}), End(&store, {}), store.DeleteJob(1, ""),
          store.Purge(absl::InfinitePast()).status(), store.AbandonUpload(1)}) {
      EXPECT_TRUE(absl::IsUnavailable(status)) << status;
      EXPECT_EQ(ErrorReason(status), "STORE_FAILED");
    }
  }

  // The next life is on another machine, with what was left on the disk.
  void LosePower() {
    auto folder = std::make_unique<StoreFolder>();
    vfs_->WriteSurvivors(folder_->path(), folder->path(), &random_);
    vfs_ = std::make_unique<FaultVfs>();
    vfs_->Adopt(folder->path());
    folder_ = std::move(folder);
  }

  const uint64_t seed_ = static_cast<uint64_t>(GetParam());
  std::mt19937_64 random_{seed_};
  std::unique_ptr<StoreFolder> folder_ = std::make_unique<StoreFolder>();
  std::unique_ptr<FaultVfs> vfs_ = std::make_unique<FaultVfs>();
  std::unique_ptr<StoreDriver> driver_;
  int num_ops_ = 300;  // of a life
  StorePoint point_;   // where the store was when it was last opened
  int64_t num_known_ = 0, num_asked_ = 0;
  int num_opened_ = 0;  // since then
};

TEST_P(StoreFaultsTest, NothingThatWasSaidIsLost) {
  const int num_lives = std::getenv("LATENTD_TEST_LONG") != nullptr ? 400 : 25;
  int num_failed = 0;
  for (int life = 0; life < num_lives; ++life) {
    const Fault fault = static_cast<Fault>(random_() % 5);
    const auto calls = static_cast<int64_t>(1 + random_() % (random_() % 3 == 0 ? 30 : 700));
    SCOPED_TRACE(absl::StrCat("life ", life, ", fault ", fault, " at call ", calls));
    Live(fault, calls);
    ASSERT_FALSE(HasFailure());
    num_failed += vfs_->has_failed() ? 1 : 0;
  }
  EXPECT_GT(num_failed, num_lives / 10);
  EXPECT_GT(point_.num_ops, 20 * num_lives);
}

// What a failed sync left can be read, and is on no disk.
TEST_P(StoreFaultsTest, PowerIsLostWhileAFailedStoreOpensAgain) {
  num_ops_ = 60;
  for (int call = 1; call <= 25; ++call) {
    SCOPED_TRACE(absl::StrCat("power lost at call ", call));
    Live(Fault::kSync, static_cast<int64_t>(2 + random_() % 20));
    Live(Fault::kPowerLoss, call);
    Live(Fault::kNone, 0);
    ASSERT_FALSE(HasFailure());
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, StoreFaultsTest, ::testing::Range(1, 3));

}  // namespace
}  // namespace latentd
