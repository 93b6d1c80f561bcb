#include "server/batch/batch_store.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <iterator>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/batch/batch_schema.h"
#include "server/batch/batch_store_impl.h"

namespace latentd {
namespace {

namespace fs = std::filesystem;

constexpr char kFileName[] = "batch.db";

absl::Status SystemError(const fs::path& path, std::string_view doing) {
  return absl::UnavailableError(
      absl::StrCat(std::string(doing), " ", path.string(), ": ", std::strerror(errno)));
}

// Makes the entries of a directory durable, such as a file that was just made in it.
absl::Status SyncDirectory(const fs::path& directory) {
  const int fd = open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return SystemError(directory, "cannot open");
  absl::Status status;
  if (fsync(fd) != 0) status = SystemError(directory, "cannot sync");
  close(fd);
  return status;
}

absl::Status MakeDirectory(const fs::path& directory) {
  std::error_code error;
  if (fs::is_directory(directory, error)) return absl::OkStatus();
  const fs::path parent = fs::absolute(directory).lexically_normal().parent_path();
  RETURN_IF_ERROR(MakeDirectory(parent));
  if (mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST) {
    return SystemError(directory, "cannot make");
  }
  return SyncDirectory(parent);
}

// What a crash or a failed store left in the journal, moved into the database: all that anyone can
// see from here on is durable.
absl::Status MoveJournal(SqliteConnection* db) {
  const int code =
      sqlite3_wal_checkpoint_v2(db->get(), nullptr, SQLITE_CHECKPOINT_TRUNCATE, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : SqliteError(db->get(), code, "checkpoint");
}

absl::StatusOr<std::unique_ptr<SqliteConnection>> OpenWriter(const fs::path& file,
                                                             const std::string& vfs) {
  RETURN_IF_ERROR(RewriteFile(file.string() + "-wal", vfs));
  ASSIGN_OR_RETURN(std::unique_ptr<SqliteConnection> db,
                   SqliteConnection::Open(file.string(), vfs, SqliteConnection::Mode::kWrite));
  RETURN_IF_ERROR(CheckBatchSchema(db.get()));
  RETURN_IF_ERROR(db->Script(
      "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA wal_autocheckpoint = 0;"
      "PRAGMA journal_size_limit = 67108864; PRAGMA cache_size = -16000; PRAGMA temp_store = 2"));
  RETURN_IF_ERROR(MoveJournal(db.get()));
  RETURN_IF_ERROR(MigrateBatchSchema(db.get()));
  return db;
}

// Counts this start in the jobs that were under way. How many those are.
absl::StatusOr<int64_t> Recover(SqliteConnection* db) {
  RETURN_IF_ERROR(db->Run("BEGIN IMMEDIATE"));
  std::vector<JobRow> rows;
  {
    SqliteQuery query =
        db->Query(absl::StrCat(std::string(SelectJobs()), "WHERE ", kNotEnded, " AND state >= ?"),
                  v1::JOB_STATE_IN_PROGRESS);
    while (true) {
      ASSIGN_OR_RETURN(std::optional<JobRow> row, NextJob(&query));
      if (!row.has_value()) break;
      rows.push_back(*std::move(row));
    }
  }
  for (JobRow& row : rows) {
    row.record.job.set_recoveries(row.record.job.recoveries() + 1);
    RETURN_IF_ERROR(SaveJob(db, &row));
  }
  RETURN_IF_ERROR(db->Run("COMMIT"));
  return static_cast<int64_t>(rows.size());
}

int64_t FileBytes(const fs::path& file) {
  std::error_code error;
  const auto bytes = fs::file_size(file, error);
  return error ? 0 : static_cast<int64_t>(bytes);
}

}  // namespace

absl::StatusOr<DirectoryLock> DirectoryLock::Take(const fs::path& directory) {
  const fs::path file = directory / "lock";
  const int fd = open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return SystemError(file, "cannot open");
  DirectoryLock lock(fd);
  if (flock(fd, LOCK_EX | LOCK_NB) == 0) return lock;
  if (errno != EWOULDBLOCK) return SystemError(file, "cannot lock");
  return absl::FailedPreconditionError(
      absl::StrCat("another process uses the batch jobs of ", directory.string()));
}

DirectoryLock::~DirectoryLock() {
  if (fd_ >= 0) close(fd_);
}

absl::StatusOr<std::unique_ptr<BatchStore>> BatchStore::Open(Options options) {
  RETURN_IF_ERROR(MakeDirectory(options.directory));
  ASSIGN_OR_RETURN(DirectoryLock lock, DirectoryLock::Take(options.directory));
  const fs::path file = options.directory / kFileName;
  ASSIGN_OR_RETURN(std::unique_ptr<SqliteConnection> db, OpenWriter(file, options.vfs));
  RETURN_IF_ERROR(SyncDirectory(options.directory));
  ASSIGN_OR_RETURN(const int64_t recoveries, Recover(db.get()));
  auto impl = std::make_unique<Impl>(std::move(lock), file, recoveries);
  RETURN_IF_ERROR(impl->readers.Open(file.string(), options.vfs));
  impl->writer = std::make_unique<StoreWriter>(
      std::move(db), StoreWriter::Options{.on_change = std::move(options.on_change),
                                          .on_commit = std::move(options.on_commit),
                                          .now = std::move(options.now),
                                          .checkpoint_pages = options.checkpoint_pages});
  return std::unique_ptr<BatchStore>(new BatchStore(std::move(impl)));
}

BatchStore::BatchStore(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
BatchStore::~BatchStore() = default;

absl::StatusOr<StoreStats> BatchStore::Stats() const {
  StoreStats stats;
  {
    ReadPool::Lease lease = impl_->readers.Take();
    RETURN_IF_ERROR(lease.status());
    SqliteQuery query = lease.db()->Query(
        "SELECT state, count(*), sum(item_count - succeeded - failed - cancelled - expired),"
        " min(CASE WHEN item_count > succeeded + failed + cancelled + expired"
        " THEN create_time END), min(nullif(expire_time, 0)) FROM jobs GROUP BY state");
    while (true) {
      ASSIGN_OR_RETURN(const bool has_row, query.Step());
      if (!has_row) break;
      const auto state = static_cast<v1::JobState>(query.Int(0));
      stats.jobs.emplace_back(state, query.Int(1));
      if (state == v1::JOB_STATE_VALIDATING || state >= v1::JOB_STATE_COMPLETED) continue;
      stats.items_pending += query.Int(2);
      if (!query.IsNull(3)) {
        stats.oldest_pending = std::min(stats.oldest_pending, absl::FromUnixMicros(query.Int(3)));
      }
      if (!query.IsNull(4)) {
        stats.earliest_expiry = std::min(stats.earliest_expiry, absl::FromUnixMicros(query.Int(4)));
      }
    }
  }
  const StoreWriter::Counters counters = impl_->writer->counters();
  std::copy(std::begin(counters.items_ended), std::end(counters.items_ended), stats.items_ended);
  stats.failed = counters.failed;
  stats.num_commits = counters.num_commits;
  stats.commit_time = counters.commit_time;
  stats.recoveries = impl_->recoveries;
  for (const char* suffix : {"", "-wal", "-shm"}) {
    stats.bytes += FileBytes(impl_->file.string() + suffix);
  }
  return stats;
}

}  // namespace latentd
