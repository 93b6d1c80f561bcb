#ifndef LATENTD_SERVER_BATCH_READ_POOL_H_
#define LATENTD_SERVER_BATCH_READ_POOL_H_

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "server/batch/sqlite.h"

namespace latentd {

// A few connections that read. Any thread; who finds none free waits.
class ReadPool {
 public:
  // A connection for one use, which sees the database as it was at the first query.
  class Lease {
   public:
    Lease(ReadPool* pool, std::unique_ptr<SqliteConnection> db)
        : pool_(pool), db_(std::move(db)), status_(db_->Run("BEGIN")) {}
    ~Lease() {
      if (status_.ok()) db_->Run("ROLLBACK").IgnoreError();
      pool_->GiveBack(std::move(db_));
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;

    const absl::Status& status() const { return status_; }
    SqliteConnection* db() { return db_.get(); }

   private:
    ReadPool* const pool_;
    std::unique_ptr<SqliteConnection> db_;
    const absl::Status status_;
  };

  // Opens all connections that there will be.
  absl::Status Open(const std::string& file, const std::string& vfs) ABSL_LOCKS_EXCLUDED(mutex_);
  // One use at a time of each thread, else they may wait for each other.
  Lease Take() ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void GiveBack(std::unique_ptr<SqliteConnection> db) ABSL_LOCKS_EXCLUDED(mutex_);

  absl::Mutex mutex_;
  std::vector<std::unique_ptr<SqliteConnection>> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_READ_POOL_H_
