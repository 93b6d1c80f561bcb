#include "server/batch/store_writer.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/synchronization/notification.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/log.h"

namespace latentd {
namespace {

// A group ends here, that those who come later do not wait for a transaction of any length.
constexpr size_t kMaxGroupBytes = size_t{8} << 20;
constexpr size_t kMaxGroupSize = 4096;

// When readers were in the way for so many checkpoints, the next waits for them, so that the
// journal can begin anew instead of growing on.
constexpr int kMaxCheckpoints = 8;

}  // namespace

StoreWriter::StoreWriter(std::unique_ptr<SqliteConnection> db, Options options)
    : options_(std::move(options)), db_(std::move(db)) {
  sqlite3_wal_hook(
      db_->get(),
      [](void* self, sqlite3*, const char*, int pages) {
        static_cast<StoreWriter*>(self)->journal_pages_ = pages;
        return SQLITE_OK;
      },
      this);
  db_->MoveJournalOnClose(true);
  thread_ = std::thread([this] { Loop(); });
}

StoreWriter::~StoreWriter() { Finish(); }

void StoreWriter::Finish() {
  {
    absl::MutexLock lock(&mutex_);
    ended_ = true;
  }
  if (thread_.joinable()) thread_.join();
}

void StoreWriter::Enqueue(size_t bytes, Operation operation, Done done) {
  absl::MutexLock lock(&mutex_);
  queue_.push_back({.bytes = bytes,
                    .operation = std::move(operation),
                    .done = std::move(done),
                    .status = absl::OkStatus()});
}

absl::Status StoreWriter::Run(const Operation& operation) {
  absl::Status result;
  absl::Notification done;
  Enqueue(0, operation, [&](const absl::Status& status) {
    result = status;
    done.Notify();
  });
  done.WaitForNotification();
  return result;
}

StoreWriter::Counters StoreWriter::counters() const {
  absl::MutexLock lock(&mutex_);
  return counters_;
}

// ---- the thread ------------------------------------------------------------------------------

void StoreWriter::Loop() {
  while (true) {
    std::vector<Entry> group = TakeGroup();
    if (group.empty()) return;
    StoreTransaction transaction{.db = db_.get(), .now = options_.now(), .changed = {}};
    absl::Status status = failure_;
    if (status.ok()) {
      const absl::Time begin = absl::Now();
      status = Write(&group, &transaction);
      if (status.ok()) {
        const absl::Duration time = absl::Now() - begin;
        CountCommit(transaction, time);
        if (options_.on_commit) options_.on_commit(time);
      } else {
        Fail(status);
        status = failure_;
      }
    }
    if (status.ok() && options_.on_change && !transaction.changed.empty()) {
      std::sort(transaction.changed.begin(), transaction.changed.end());
      transaction.changed.erase(std::unique(transaction.changed.begin(), transaction.changed.end()),
                                transaction.changed.end());
      options_.on_change(transaction.changed);
    }
    for (Entry& entry : group) {
      // What an operation refused by itself was no promise; it stays what it was.
      entry.done(status.ok() || !entry.status.ok() ? entry.status : status);
    }
    group.clear();  // what the operations hold is freed before the wait
    if (failure_.ok()) {
      if (absl::Status error = CheckpointIfDue(); !error.ok()) Fail(error);
    }
  }
}

std::vector<StoreWriter::Entry> StoreWriter::TakeGroup() {
  absl::MutexLock lock(&mutex_);
  const auto has_work = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return ended_ || !queue_.empty();
  };
  mutex_.Await(absl::Condition(&has_work));
  std::vector<Entry> group;
  size_t bytes = 0;
  while (!queue_.empty() && bytes < kMaxGroupBytes && group.size() < kMaxGroupSize) {
    bytes += queue_.front().bytes;
    group.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  return group;
}

absl::Status StoreWriter::Write(std::vector<Entry>* group, StoreTransaction* transaction) {
  RETURN_IF_ERROR(db_->Run("BEGIN IMMEDIATE"));
  for (Entry& entry : *group) RETURN_IF_ERROR(WriteOne(&entry, transaction));
  return db_->Run("COMMIT");
}

// The error is the group's; the operation's own is the entry's.
absl::Status StoreWriter::WriteOne(Entry* entry, StoreTransaction* transaction) {
  StoreTransaction own{.db = db_.get(), .now = transaction->now, .changed = {}};
  RETURN_IF_ERROR(db_->Run("SAVEPOINT operation"));
  entry->status = entry->operation(&own);
  if (IsStoreFailure(entry->status)) return std::exchange(entry->status, absl::OkStatus());
  if (!entry->status.ok()) RETURN_IF_ERROR(db_->Run("ROLLBACK TO operation"));
  RETURN_IF_ERROR(db_->Run("RELEASE operation"));
  if (!entry->status.ok()) return absl::OkStatus();
  transaction->changed.insert(transaction->changed.end(), own.changed.begin(), own.changed.end());
  for (int i = 0; i < 4; ++i) transaction->items_ended[i] += own.items_ended[i];
  return absl::OkStatus();
}

void StoreWriter::CountCommit(const StoreTransaction& transaction, absl::Duration time) {
  absl::MutexLock lock(&mutex_);
  for (int i = 0; i < 4; ++i) counters_.items_ended[i] += transaction.items_ended[i];
  ++counters_.num_commits;
  counters_.commit_time += time;
}

void StoreWriter::Fail(const absl::Status& why) {
  failure_ =
      IsStoreFailure(why) ? why : SqliteError(nullptr, SQLITE_IOERR, std::string(why.message()));
  {
    absl::MutexLock lock(&mutex_);
    counters_.failed = true;
  }
  db_->Run("ROLLBACK").IgnoreError();  // SQLite may have done so
  db_->MoveJournalOnClose(false);      // that would be another try
  LogEvent(spdlog::level::err, "the store of batch jobs failed; it takes nothing more",
           {{"why", std::string(why.message())}});
}

// By hand, because SQLite's own checkpoints after a commit pass over their errors.
absl::Status StoreWriter::CheckpointIfDue() {
  // Fewer than there were: the journal began anew, which it does once all of it was moved.
  if (journal_pages_ < checkpoint_pages_) checkpoint_pages_ = 0;
  if (journal_pages_ - checkpoint_pages_ < options_.checkpoint_pages) return absl::OkStatus();
  const int mode = journal_pages_ >= kMaxCheckpoints * options_.checkpoint_pages
                       ? SQLITE_CHECKPOINT_RESTART
                       : SQLITE_CHECKPOINT_PASSIVE;
  const int code = sqlite3_wal_checkpoint_v2(db_->get(), nullptr, mode, nullptr, nullptr);
  // Busy: a reader was in the way; what it needs is moved by a later one.
  if (code != SQLITE_OK && (code & 0xFF) != SQLITE_BUSY) {
    return SqliteError(db_->get(), code, "checkpoint");
  }
  checkpoint_pages_ = journal_pages_;
  return absl::OkStatus();
}

}  // namespace latentd
