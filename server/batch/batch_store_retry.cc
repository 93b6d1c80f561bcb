#include <cstdint>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/batch/batch_store.h"
#include "server/batch/batch_store_impl.h"
#include "server/batch/item_chain.h"
#include "server/status.h"

namespace latentd {
namespace {

// What one transaction copies at most.
constexpr int64_t kItemsAtOnce = 1000;
constexpr int64_t kBytesAtOnce = int64_t{4} << 20;

// Where a new job of this key is to copy from, or the row that there is already.
absl::StatusOr<JobRow> FindOrBegin(StoreTransaction* transaction, JobId source,
                                   std::string_view owner, std::string_view request_id) {
  ASSIGN_OR_RETURN(std::optional<JobRow> found, FindJob(transaction->db, owner, request_id));
  if (found.has_value()) {
    if (found->retry_source == source) return *std::move(found);
    return MakeError(absl::StatusCode::kAlreadyExists, "REQUEST_ID_USED",
                     "the request_id is that of another job",
                     {{"request_id", std::string(request_id)}});
  }
  ASSIGN_OR_RETURN(const JobRow from, LoadJob(transaction->db, source));
  const v1::Job& old = from.record.job;
  if (!from.has_ended()) {
    return MakeError(absl::StatusCode::kFailedPrecondition, "JOB_NOT_ENDED",
                     "the job has not ended", {{"job", old.name()}});
  }
  if (old.counts().succeeded() == old.counts().total()) {
    return MakeError(absl::StatusCode::kFailedPrecondition, "NOTHING_TO_RETRY",
                     "every item of the job has a success", {{"job", old.name()}});
  }
  JobRow row;
  row.record.owner = std::string(owner);
  row.retry_source = source;
  row.touch_time = transaction->now;
  v1::Job& job = row.record.job;
  job.set_name(NewJobName());
  job.set_request_id(std::string(request_id));
  job.set_retry_of(old.name());
  *job.mutable_spec() = old.spec();
  job.set_state(v1::JOB_STATE_VALIDATING);
  RETURN_IF_ERROR(InsertJob(transaction->db, &row));
  return row;
}

// Copies the next items; the last of them commits the job. How it is then.
absl::StatusOr<JobRow> CopySome(StoreTransaction* transaction, JobId job) {
  SqliteConnection& db = *transaction->db;
  ASSIGN_OR_RETURN(JobRow row, LoadJob(&db, job));
  if (row.state() != v1::JOB_STATE_VALIDATING) return row;
  ASSIGN_OR_RETURN(const JobRow source, LoadJob(&db, row.retry_source));
  ItemChain chain(row.chain);
  int64_t index = row.item_count();
  int64_t bytes = 0;
  bool all = true;
  {
    SqliteQuery query = db.Query(
        "SELECT items.id, custom_id, request FROM items JOIN progress USING (id)"
        " WHERE id >= ? AND id < ? AND state != ? ORDER BY id",
        RowOf(row.retry_source, row.retry_next), RowOf(row.retry_source + 1, 0),
        v1::ITEM_STATE_SUCCEEDED);
    const int64_t end = index + kItemsAtOnce;
    while (true) {
      ASSIGN_OR_RETURN(const bool has_row, query.Step());
      if (!has_row) break;
      all = index < end && bytes < kBytesAtOnce;
      if (!all) break;
      // The new job's rows are past the range that is read.
      RETURN_IF_ERROR(db.Run("INSERT INTO items (id, custom_id, request) VALUES (?, ?, ?)",
                             RowOf(job, index++), query.Text(1), SqliteBlob{query.Text(2)}));
      chain.Add(query.Text(2));
      bytes += static_cast<int64_t>(query.Text(2).size());
      row.retry_next = IndexOf(query.Int(0)) + 1;
    }
  }
  row.record.job.mutable_counts()->set_total(index);
  row.chain = chain.value();
  row.touch_time = transaction->now;
  if (all) CommitRow(transaction->now, &row);
  RETURN_IF_ERROR(SaveJob(transaction, &row));
  return row;
}

}  // namespace

absl::StatusOr<BatchStore::Upload> BatchStore::RetryJob(JobId job, std::string_view owner,
                                                        std::string_view request_id) {
  bool is_new = false;
  // In several transactions. A crash between them leaves an upload, which the next call with the
  // same key goes on with; two calls at the same time help each other.
  ASSIGN_OR_RETURN(JobRow row, impl_->Write<JobRow>([&](StoreTransaction* transaction) {
    return FindOrBegin(transaction, job, owner, request_id);
  }));
  while (row.state() == v1::JOB_STATE_VALIDATING) {
    is_new = true;
    absl::StatusOr<JobRow> next = impl_->Write<JobRow>(
        [&](StoreTransaction* transaction) { return CopySome(transaction, row.record.id); });
    if (absl::IsNotFound(next.status())) {  // the old job was deleted meanwhile
      RETURN_IF_ERROR(AbandonUpload(row.record.id));
    }
    if (!next.ok()) return next.status();
    row = *std::move(next);
  }
  const int64_t item_count = row.item_count();
  return Upload{.record = std::move(row.record),
                .item_count = item_count,
                .sha256 = std::move(row.chain),
                .is_new = is_new};
}

}  // namespace latentd
