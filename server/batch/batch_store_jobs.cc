#include <algorithm>
#include <cstdint>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "google/protobuf/util/time_util.h"
#include "google/rpc/code.pb.h"
#include "server/batch/batch_store.h"
#include "server/batch/batch_store_impl.h"
#include "server/status.h"

namespace latentd {
namespace {

// Rows that one transaction writes of an operation on a whole job: the writer is held for some tens
// of milliseconds.
constexpr int64_t kRowsAtOnce = 2000;
// And that one Purge() deletes.
constexpr int64_t kRowsOfPurge = 200'000;
constexpr int64_t kJobsAtOnce = 100;

// The result of items that a job's end left without one.
v1::ItemResult EndedResult(v1::JobState end_state) {
  v1::ItemResult result;
  result.set_state(v1::ITEM_STATE_CANCELLED);
  v1::ItemError& error = *result.mutable_error();
  error.set_code(google::rpc::CANCELLED);
  switch (end_state) {
    case v1::JOB_STATE_EXPIRED:
      result.set_state(v1::ITEM_STATE_EXPIRED);
      error.set_code(google::rpc::DEADLINE_EXCEEDED);
      error.set_reason("JOB_EXPIRED");
      error.set_message("the job's completion_window passed before the item had ended");
      break;
    case v1::JOB_STATE_FAILED:
      error.set_reason("JOB_FAILED");
      error.set_message("the job failed before the item had ended");
      break;
    default:
      error.set_reason("JOB_CANCELLED");
      error.set_message("the job was cancelled before the item had ended");
  }
  return result;
}

// Ends up to `limit` items. True when none are left.
absl::StatusOr<bool> EndItemsOf(StoreTransaction* transaction, int64_t limit, JobRow* row) {
  const JobId job = row->record.id;
  std::vector<PendingProgress> items;  // first: rows are not changed under a query that reads them
  bool all = true;
  RETURN_IF_ERROR(VisitPending(transaction->db, job, row->finalized, row->item_count(),
                               [&](const PendingProgress& item) -> absl::StatusOr<bool> {
                                 all = std::ssize(items) < limit;
                                 if (all) items.push_back(item);
                                 return all;
                               }));
  v1::ItemResult result = EndedResult(row->record.end_state);
  const v1::ItemState state = result.state();
  result.clear_state();
  const std::string outcome = result.SerializeAsString();
  for (const PendingProgress& item : items) {
    RETURN_IF_ERROR(transaction->db->Run(
        "INSERT INTO progress (id, attempts, seed, state) VALUES (?, ?, ?, ?)"
        " ON CONFLICT (id) DO UPDATE SET state = excluded.state",
        RowOf(job, item.index), item.attempts, static_cast<int64_t>(item.seed), state));
    RETURN_IF_ERROR(transaction->db->Run(
        "INSERT INTO results (id, item_index, state, attempts, outcome) VALUES (?, ?, ?, ?, ?)",
        RowOf(job, row->next_sequence++), item.index, state, item.attempts, SqliteBlob{outcome}));
  }
  const auto num_ended = static_cast<int64_t>(items.size());
  v1::JobCounts& counts = *row->record.job.mutable_counts();
  if (state == v1::ITEM_STATE_EXPIRED) {
    counts.set_expired(counts.expired() + num_ended);
    transaction->items_ended[3] += num_ended;
  } else {
    counts.set_cancelled(counts.cancelled() + num_ended);
    transaction->items_ended[2] += num_ended;
  }
  row->finalized = all ? row->item_count() : items.back().index + 1;
  return all;
}

absl::StatusOr<bool> Finalize(StoreTransaction* transaction, JobId job, int64_t limit) {
  ASSIGN_OR_RETURN(JobRow row, LoadJob(transaction->db, job));
  if (row.has_ended()) return true;
  if (row.state() != v1::JOB_STATE_FINALIZING && row.state() != v1::JOB_STATE_CANCELLING) {
    return absl::FailedPreconditionError(
        absl::StrCat(row.record.job.name(), " is not being finalized"));
  }
  ASSIGN_OR_RETURN(const bool all, EndItemsOf(transaction, limit, &row));
  if (all) {
    v1::Job& out = row.record.job;
    out.set_state(row.record.end_state);
    *out.mutable_end_time() = ToTimestamp(transaction->now);
    if (out.spec().has_result_ttl()) {
      *out.mutable_purge_time() = out.end_time() + out.spec().result_ttl();
    }
  }
  RETURN_IF_ERROR(SaveJob(transaction, &row));
  return all;
}

bool Matches(const v1::Job& job, const std::vector<std::pair<std::string, std::string>>& metadata) {
  return std::all_of(metadata.begin(), metadata.end(), [&](const auto& entry) {
    const auto found = job.spec().metadata().find(entry.first);
    return found != job.spec().metadata().end() && found->second == entry.second;
  });
}

// Removes jobs that are due, and old uploads. How many.
absl::StatusOr<int64_t> RemoveDue(StoreTransaction* transaction, absl::Time uploads_before) {
  std::vector<JobId> due;
  const auto add = [&due](SqliteQuery query) -> absl::Status {
    while (std::ssize(due) < kJobsAtOnce) {
      ASSIGN_OR_RETURN(const bool has_row, query.Step());
      if (!has_row) break;
      due.push_back(query.Int(0));
    }
    return absl::OkStatus();
  };
  SqliteConnection& db = *transaction->db;
  RETURN_IF_ERROR(add(db.Query("SELECT id FROM jobs WHERE purge_time != 0 AND purge_time <= ?",
                               absl::ToUnixMicros(transaction->now))));
  RETURN_IF_ERROR(add(db.Query(
      absl::StrCat("SELECT id FROM jobs WHERE ", kNotEnded, " AND state = ? AND touch_time < ?"),
      v1::JOB_STATE_VALIDATING, absl::ToUnixMicros(uploads_before))));
  for (const JobId job : due) RETURN_IF_ERROR(RemoveJob(transaction, job));
  return static_cast<int64_t>(due.size());
}

// Deletes some rows of jobs that are gone. How many; 0: none are left.
absl::StatusOr<int64_t> DeleteRows(StoreTransaction* transaction) {
  SqliteConnection& db = *transaction->db;
  JobId job = 0;
  {
    SqliteQuery query = db.Query("SELECT job FROM deleted ORDER BY job LIMIT 1");
    ASSIGN_OR_RETURN(const bool has_row, query.Step());
    if (!has_row) return 0;
    job = query.Int(0);
  }
  int64_t deleted = 0;
  for (const char* table : {"items", "progress", "results"}) {
    RETURN_IF_ERROR(db.Run(absl::StrCat("DELETE FROM ", table, " WHERE id IN (SELECT id FROM ",
                                        table, " WHERE id >= ? AND id < ? LIMIT ?)"),
                           RowOf(job, 0), RowOf(job + 1, 0), kRowsAtOnce - deleted));
    deleted += sqlite3_changes64(db.get());
    if (deleted == kRowsAtOnce) return deleted;
  }
  RETURN_IF_ERROR(db.Run("DELETE FROM deleted WHERE job = ?", job));
  return deleted + 1;
}

}  // namespace

absl::Status RemoveJob(StoreTransaction* transaction, JobId job) {
  transaction->changed.push_back(job);
  RETURN_IF_ERROR(transaction->db->Run("DELETE FROM jobs WHERE id = ?", job));
  return transaction->db->Run("INSERT INTO deleted (job) VALUES (?)", job);
}

absl::StatusOr<JobRecord> BatchStore::GetJob(std::string_view name) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  ASSIGN_OR_RETURN(JobRow row, LoadJob(lease.db(), name));
  return std::move(row.record);
}

absl::StatusOr<JobRecord> BatchStore::GetJob(JobId id) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  ASSIGN_OR_RETURN(JobRow row, LoadJob(lease.db(), id));
  return std::move(row.record);
}

absl::StatusOr<std::vector<JobRecord>> BatchStore::ListJobs(const JobFilter& filter, JobId before,
                                                            int limit) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  std::vector<int> states(filter.states.begin(), filter.states.end());
  std::sort(states.begin(), states.end());
  const std::string of_state = states.empty()
                                   ? absl::StrCat("state != ", v1::JOB_STATE_VALIDATING)
                                   : absl::StrCat("state IN (", absl::StrJoin(states, ","), ")");
  const std::string sql =
      absl::StrCat(std::string(SelectJobs()), "WHERE id < ? AND ", of_state,
                   filter.owner.empty() ? "" : " AND owner = ?", " ORDER BY id DESC");
  SqliteQuery query = filter.owner.empty() ? lease.db()->Query(sql, before)
                                           : lease.db()->Query(sql, before, filter.owner);
  std::vector<JobRecord> jobs;
  while (std::ssize(jobs) < limit) {
    ASSIGN_OR_RETURN(std::optional<JobRow> row, NextJob(&query));
    if (!row.has_value()) break;
    if (Matches(row->record.job, filter.metadata)) jobs.push_back(std::move(row->record));
  }
  return jobs;
}

absl::StatusOr<std::vector<JobRecord>> BatchStore::ActiveJobs() const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  SqliteQuery query = lease.db()->Query(absl::StrCat(std::string(SelectJobs()), "WHERE ", kNotEnded,
                                                     " AND state > ? ORDER BY create_time, id"),
                                        v1::JOB_STATE_VALIDATING);
  std::vector<JobRecord> jobs;
  while (true) {
    ASSIGN_OR_RETURN(std::optional<JobRow> row, NextJob(&query));
    if (!row.has_value()) return jobs;
    jobs.push_back(std::move(row->record));
  }
}

absl::StatusOr<BatchStore::Usage> BatchStore::UsageOf(std::string_view owner) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  SqliteQuery query = lease.db()->Query(
      absl::StrCat("SELECT count(*), sum(item_count - succeeded - failed - cancelled - expired)"
                   " FROM jobs WHERE owner = ? AND ",
                   kNotEnded),
      owner);
  ASSIGN_OR_RETURN(const bool has_row, query.Step());
  if (!has_row) return absl::InternalError("no row");
  return Usage{.jobs = query.Int(0), .items = query.Int(1)};
}

absl::StatusOr<JobRecord> BatchStore::EndJob(JobId job, v1::JobState end_state,
                                             std::string_view reason) {
  LATENTD_CHECK(end_state > v1::JOB_STATE_COMPLETED);
  return impl_->Write<JobRecord>([&](StoreTransaction* transaction) -> absl::StatusOr<JobRecord> {
    ASSIGN_OR_RETURN(JobRow row, LoadJob(transaction->db, job));
    if (row.state() == v1::JOB_STATE_VALIDATING) {
      return MakeError(absl::StatusCode::kFailedPrecondition, "UPLOAD_NOT_COMMITTED",
                       "the job is not committed yet", {{"job", row.record.job.name()}});
    }
    if (row.state() > v1::JOB_STATE_IN_PROGRESS) return std::move(row.record);
    v1::Job& out = row.record.job;
    row.record.end_state = end_state;
    out.set_state(end_state == v1::JOB_STATE_CANCELLED ? v1::JOB_STATE_CANCELLING
                                                       : v1::JOB_STATE_FINALIZING);
    out.set_state_reason(std::string(reason));
    *out.mutable_finalize_time() = ToTimestamp(transaction->now);
    RETURN_IF_ERROR(SaveJob(transaction, &row));
    return std::move(row.record);
  });
}

absl::StatusOr<bool> BatchStore::FinalizeSome(JobId job, int64_t limit) {
  limit = std::max<int64_t>(limit, 1);
  while (true) {
    const int64_t now = std::min(limit, kRowsAtOnce);
    ASSIGN_OR_RETURN(const bool all, impl_->Write<bool>([&](StoreTransaction* transaction) {
      return Finalize(transaction, job, now);
    }));
    limit -= now;
    if (all || limit == 0) return all;
  }
}

absl::Status BatchStore::DeleteJob(JobId job, std::string_view etag) {
  return impl_->writer->Run([&](StoreTransaction* transaction) -> absl::Status {
    ASSIGN_OR_RETURN(const JobRow row, LoadJob(transaction->db, job));
    const v1::Job& found = row.record.job;
    if (!row.has_ended()) {
      return MakeError(absl::StatusCode::kFailedPrecondition, "JOB_NOT_ENDED",
                       "the job has not ended: cancel it first", {{"job", found.name()}});
    }
    if (!etag.empty() && etag != found.etag()) {
      return MakeError(absl::StatusCode::kAborted, "ETAG_MISMATCH",
                       "the job has changed: its etag is another", {{"etag", found.etag()}});
    }
    return RemoveJob(transaction, job);
  });
}

absl::StatusOr<int64_t> BatchStore::Purge(absl::Time uploads_before) {
  int64_t num_jobs = 0;
  while (true) {
    ASSIGN_OR_RETURN(const int64_t removed,
                     impl_->Write<int64_t>([&](StoreTransaction* transaction) {
                       return RemoveDue(transaction, uploads_before);
                     }));
    num_jobs += removed;
    if (removed < kJobsAtOnce) break;
  }
  for (int64_t num_rows = 0; num_rows < kRowsOfPurge;) {
    ASSIGN_OR_RETURN(const int64_t deleted, impl_->Write<int64_t>(DeleteRows));
    if (deleted == 0) break;
    num_rows += deleted;
  }
  return num_jobs;
}

}  // namespace latentd
