#ifndef LATENTD_SERVER_BATCH_BATCH_STORE_IMPL_H_
#define LATENTD_SERVER_BATCH_BATCH_STORE_IMPL_H_

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/batch/batch_store.h"
#include "server/batch/job_row.h"
#include "server/batch/read_pool.h"
#include "server/batch/store_writer.h"

// Of the batch_store*.cc alone.

namespace latentd {

// The right to the directory, as long as it lives.
class DirectoryLock {
 public:
  // FAILED_PRECONDITION when another process has it.
  static absl::StatusOr<DirectoryLock> Take(const std::filesystem::path& directory);
  DirectoryLock(DirectoryLock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~DirectoryLock();

 private:
  explicit DirectoryLock(int fd) : fd_(fd) {}
  int fd_;
};

class BatchStore::Impl {
 public:
  Impl(DirectoryLock lock, std::filesystem::path file, int64_t recoveries)
      : lock(std::move(lock)), file(std::move(file)), recoveries(recoveries) {}
  // The readers close before the writer, which then moves the journal into the database; what is
  // still to be written, and who is told of it, may read.
  ~Impl() {
    if (writer != nullptr) writer->Finish();
  }

  // Has the writer call `write(transaction)`, and gives what it returned once that is committed.
  template <typename T, typename Operation>
  absl::StatusOr<T> Write(const Operation& write) {
    std::optional<T> value;
    const absl::Status status = writer->Run([&](StoreTransaction* transaction) -> absl::Status {
      absl::StatusOr<T> result = write(transaction);
      if (result.ok()) value = *std::move(result);
      return result.status();
    });
    if (!status.ok()) return status;
    return *std::move(value);
  }

  const DirectoryLock lock;
  const std::filesystem::path file;
  const int64_t recoveries;
  std::unique_ptr<StoreWriter> writer;
  mutable ReadPool readers;
};

google::protobuf::Timestamp ToTimestamp(absl::Time time);

// `jobs/` and 32 random hexadecimal digits.
std::string NewJobName();

// Makes an upload a job, QUEUED.
void CommitRow(absl::Time now, JobRow* row);

// As BatchStore::FindDuplicates.
absl::StatusOr<std::vector<BatchStore::Duplicate>> FindDuplicates(SqliteConnection* db, JobId job,
                                                                  int64_t item_count, int limit);

// Saves the row and says that it has changed.
absl::Status SaveJob(StoreTransaction* transaction, JobRow* row);

// The job is gone; Purge() deletes its items and results.
absl::Status RemoveJob(StoreTransaction* transaction, JobId job);

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_STORE_IMPL_H_
