#include "server/batch/read_pool.h"

#include "engine/status.h"

namespace latentd {
namespace {

constexpr int kNumConnections = 4;

}  // namespace

absl::Status ReadPool::Open(const std::string& file, const std::string& vfs) {
  absl::MutexLock lock(&mutex_);
  for (int i = 0; i < kNumConnections; ++i) {
    ASSIGN_OR_RETURN(std::unique_ptr<SqliteConnection> db,
                     SqliteConnection::Open(file, vfs, SqliteConnection::Mode::kRead));
    RETURN_IF_ERROR(db->Script("PRAGMA cache_size = -2000"));
    free_.push_back(std::move(db));
  }
  return absl::OkStatus();
}

ReadPool::Lease ReadPool::Take() {
  std::unique_ptr<SqliteConnection> db;
  {
    absl::MutexLock lock(&mutex_);
    const auto has_free = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return !free_.empty(); };
    mutex_.Await(absl::Condition(&has_free));
    db = std::move(free_.back());
    free_.pop_back();
  }
  return Lease(this, std::move(db));
}

void ReadPool::GiveBack(std::unique_ptr<SqliteConnection> db) {
  absl::MutexLock lock(&mutex_);
  free_.push_back(std::move(db));
}

}  // namespace latentd
