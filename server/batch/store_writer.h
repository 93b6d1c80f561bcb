#ifndef LATENTD_SERVER_BATCH_STORE_WRITER_H_
#define LATENTD_SERVER_BATCH_STORE_WRITER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"
#include "server/batch/sqlite.h"

namespace latentd {

// What one operation reads and writes, inside the transaction of its group.
struct StoreTransaction {
  SqliteConnection* db;
  absl::Time now;
  // What the commit shall tell.
  std::vector<JobId> changed;
  int64_t items_ended[4] = {};  // as StoreStats
};

// The thread that writes: takes all that is queued as one transaction, commits it, and says so.
//
// An operation that fails takes back what it wrote, and only that. When the disk fails, the whole
// group is rolled back, and it and all that comes later fails: a write or an fsync is never tried
// again, for after a failed fsync nobody knows which of the pages before it are on the disk.
class StoreWriter {
 public:
  using Operation = std::function<absl::Status(StoreTransaction*)>;
  using Done = BatchStore::Done;

  struct Options {
    std::function<void(const std::vector<JobId>&)> on_change;  // may be empty
    std::function<void(absl::Duration)> on_commit;             // likewise
    std::function<absl::Time()> now;
    int checkpoint_pages = 0;
  };
  struct Counters {
    int64_t items_ended[4] = {};
    bool failed = false;
    int64_t num_commits = 0;
    absl::Duration commit_time;
  };

  StoreWriter(std::unique_ptr<SqliteConnection> db, Options options);
  ~StoreWriter();  // Finish()

  // Does what is queued, and ends the thread. No-op after the first.
  void Finish() ABSL_LOCKS_EXCLUDED(mutex_);

  // `bytes`: about what it writes; a transaction is ended when it has written enough.
  void Enqueue(size_t bytes, Operation operation, Done done) ABSL_LOCKS_EXCLUDED(mutex_);
  // Returns once it is committed, or not. Not for the writer's own thread.
  absl::Status Run(const Operation& operation) ABSL_LOCKS_EXCLUDED(mutex_);

  Counters counters() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct Entry {
    size_t bytes = 0;
    Operation operation;
    Done done;
    absl::Status status;
  };

  void Loop() ABSL_LOCKS_EXCLUDED(mutex_);
  // Empty: the end.
  std::vector<Entry> TakeGroup() ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status Write(std::vector<Entry>* group, StoreTransaction* transaction);
  absl::Status WriteOne(Entry* entry, StoreTransaction* transaction);
  void CountCommit(const StoreTransaction& transaction, absl::Duration time)
      ABSL_LOCKS_EXCLUDED(mutex_);
  void Fail(const absl::Status& why);
  absl::Status CheckpointIfDue();

  const Options options_;
  // The thread's alone.
  const std::unique_ptr<SqliteConnection> db_;
  absl::Status failure_;
  int journal_pages_ = 0;     // in the journal after the last commit
  int checkpoint_pages_ = 0;  // and at the last checkpoint; 0: it began anew since

  mutable absl::Mutex mutex_;
  std::deque<Entry> queue_ ABSL_GUARDED_BY(mutex_);
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  Counters counters_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_STORE_WRITER_H_
