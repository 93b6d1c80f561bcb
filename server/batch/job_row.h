#ifndef LATENTD_SERVER_BATCH_JOB_ROW_H_
#define LATENTD_SERVER_BATCH_JOB_ROW_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"
#include "server/batch/sqlite.h"

namespace latentd {

// A job's row: what all may see, and what only the store needs.
struct JobRow {
  JobRecord record;
  std::string chain;
  JobId retry_source = 0;  // 0: none
  int64_t retry_next = 0;
  int64_t next_sequence = 1;
  int64_t finalized = 0;  // all items below it have a result
  absl::Time touch_time;

  v1::JobState state() const { return record.job.state(); }
  int64_t item_count() const { return record.job.counts().total(); }
  int64_t num_without_result() const { return record.job.counts().pending(); }
  bool has_ended() const { return state() >= v1::JOB_STATE_COMPLETED; }
  bool is_active() const { return state() > v1::JOB_STATE_VALIDATING && !has_ended(); }
};

// Rows of items, progress and results: those of a job lie in [RowOf(job, 0), RowOf(job + 1, 0)).
inline constexpr int64_t kMaxItemsOfJob = int64_t{1} << 31;
inline int64_t RowOf(JobId job, int64_t index) { return (job << 32) + index; }
inline int64_t IndexOf(int64_t row) { return row & 0xFFFF'FFFF; }

// NOT_FOUND, reason JOB_NOT_FOUND.
absl::StatusOr<JobRow> LoadJob(SqliteConnection* db, JobId id);
absl::StatusOr<JobRow> LoadJob(SqliteConnection* db, std::string_view name);
// Nothing when there is none.
absl::StatusOr<std::optional<JobRow>> FindJob(SqliteConnection* db, JobId id);
absl::StatusOr<std::optional<JobRow>> FindJob(SqliteConnection* db, std::string_view owner,
                                              std::string_view request_id);
// Of `query` with JobColumns(): its next row, nothing after the last.
absl::StatusOr<std::optional<JobRow>> NextJob(SqliteQuery* query);
// "SELECT <columns> FROM jobs "
std::string_view SelectJobs();
// The condition of the index of jobs that have not ended: SQLite uses it where it reads the same.
inline constexpr char kNotEnded[] = "state < 6";
static_assert(v1::JOB_STATE_COMPLETED == 6);

// Adds the row, and gives it id and revision.
absl::Status InsertJob(SqliteConnection* db, JobRow* row);
// Writes all that may change, with the next revision.
absl::Status SaveJob(SqliteConnection* db, JobRow* row);

// An item without a result, as far as `progress` says.
struct PendingProgress {
  int64_t index = 0;
  int32_t attempts = 0;
  uint64_t seed = 0;
};
// Calls `visit` for the items of [first, item_count) without a result, in order, until it says
// false. Reads no items.
absl::Status VisitPending(SqliteConnection* db, JobId job, int64_t first, int64_t item_count,
                          absl::FunctionRef<absl::StatusOr<bool>(const PendingProgress&)> visit);

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_JOB_ROW_H_
