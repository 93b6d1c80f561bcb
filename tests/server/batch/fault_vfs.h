#ifndef LATENTD_TESTS_SERVER_BATCH_FAULT_VFS_H_
#define LATENTD_TESTS_SERVER_BATCH_FAULT_VFS_H_

#include <sqlite3.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace latentd {

// A file system for SQLite, over the real one, that fails when it is told to and knows what a loss
// of power would leave: what was synced, and of all else whatever it likes. It syncs nothing for
// real, which makes it fast.
class FaultVfs {
 public:
  enum class Fault {
    kNone,
    kSync,        // fsync says EIO
    kDiskFull,    // a write says that there is no room
    kShortWrite,  // half of a write is done
    kPowerLoss,   // every call fails from then on
  };

  // Registers itself under a name of its own, until it goes.
  FaultVfs();
  ~FaultVfs();
  FaultVfs(const FaultVfs&) = delete;
  FaultVfs& operator=(const FaultVfs&) = delete;

  const std::string& name() const { return name_; }

  // What is in there is durable, as the files that a machine finds when it starts.
  void Adopt(const std::filesystem::path& folder) ABSL_LOCKS_EXCLUDED(mutex_);

  // The `calls`-th write or sync from now on (from 1; of kSync: the `calls`-th sync; of a write's
  // fault: the `calls`-th write) fails. The calls after it work again, but for kPowerLoss: a
  // program that tries again would not be told.
  void FailAt(Fault fault, int64_t calls) ABSL_LOCKS_EXCLUDED(mutex_);
  bool has_failed() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Writes, syncs, truncations and deletions since it failed.
  int64_t calls_after_failure() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Writes and syncs so far.
  int64_t calls() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Makes in `to` the files that are left of those in `from` after a loss of power now: what was
  // synced, and of each later write nothing, all or some sectors.
  void WriteSurvivors(const std::filesystem::path& from, const std::filesystem::path& to,
                      std::mt19937_64* random) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  struct File;
  struct Methods;
  // Of a file: what is on the disk, and what is not yet, in order.
  struct Change {
    int64_t offset = 0;  // of a write
    std::string bytes;
    int64_t new_size = -1;  // of a truncation
  };
  struct Content {
    std::string durable;
    bool exists = false;  // durably
    std::vector<Change> pending;
  };

  // The result of a call of this kind that is about to be done.
  int Count(bool is_sync) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  static void Apply(const Change& change, std::string* content);

  const std::string name_;
  sqlite3_vfs* const real_;
  sqlite3_vfs vfs_;
  mutable absl::Mutex mutex_;
  std::map<std::string, Content> contents_ ABSL_GUARDED_BY(mutex_);  // by path
  Fault fault_ ABSL_GUARDED_BY(mutex_) = Fault::kNone;
  int64_t calls_left_ ABSL_GUARDED_BY(mutex_) = 0;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false;
  bool dead_ ABSL_GUARDED_BY(mutex_) = false;
  int64_t calls_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t calls_after_failure_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BATCH_FAULT_VFS_H_
