#include <algorithm>
#include <cstdint>
#include <map>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/batch/batch_store.h"
#include "server/batch/batch_store_impl.h"

namespace latentd {
namespace {

// The rows of the jobs that one operation meets.
class Rows {
 public:
  explicit Rows(StoreTransaction* transaction) : transaction_(transaction) {}

  // Null when the job is gone. INVALID_ARGUMENT when it has no such item, or is no job yet.
  absl::StatusOr<JobRow*> Of(JobId job, int64_t index) {
    auto found = rows_.find(job);
    if (found == rows_.end()) {
      ASSIGN_OR_RETURN(std::optional<JobRow> row, FindJob(transaction_->db, job));
      found = rows_.emplace(job, std::move(row)).first;
    }
    std::optional<JobRow>& row = found->second;
    if (!row.has_value()) return nullptr;
    if (index < 0 || index >= row->item_count() || row->state() == v1::JOB_STATE_VALIDATING) {
      return absl::InvalidArgumentError(
          absl::StrCat(row->record.job.name(), " has no item ", index, " that can run"));
    }
    return &*row;
  }

  void Changed(JobId job) { changed_[job] = true; }

  absl::Status Save() {
    for (const auto& [job, changed] : changed_) {
      RETURN_IF_ERROR(SaveJob(transaction_, &*rows_.at(job)));
    }
    return absl::OkStatus();
  }

 private:
  StoreTransaction* const transaction_;
  std::map<JobId, std::optional<JobRow>> rows_;
  std::map<JobId, bool> changed_;
};

absl::Status Start(StoreTransaction* transaction, const std::vector<ItemStart>& starts) {
  Rows rows(transaction);
  for (const ItemStart& start : starts) {
    ASSIGN_OR_RETURN(JobRow* const row, rows.Of(start.job, start.index));
    if (row == nullptr) continue;
    RETURN_IF_ERROR(transaction->db->Run(
        "INSERT INTO progress (id, attempts, seed, state) VALUES (?, 1, ?, 0)"
        " ON CONFLICT (id) DO UPDATE SET attempts = attempts + 1 WHERE state = 0",
        RowOf(start.job, start.index), static_cast<int64_t>(start.seed)));
    if (row->state() != v1::JOB_STATE_QUEUED) continue;
    row->record.job.set_state(v1::JOB_STATE_IN_PROGRESS);
    *row->record.job.mutable_start_time() = ToTimestamp(transaction->now);
    rows.Changed(start.job);
  }
  return rows.Save();
}

absl::Status Return(StoreTransaction* transaction, const std::vector<ItemStart>& starts) {
  Rows rows(transaction);
  for (const ItemStart& start : starts) {
    ASSIGN_OR_RETURN(const JobRow* const row, rows.Of(start.job, start.index));
    if (row == nullptr) continue;
    RETURN_IF_ERROR(transaction->db->Run(
        "UPDATE progress SET attempts = attempts - 1 WHERE id = ? AND attempts > 0 AND state = 0",
        RowOf(start.job, start.index)));
  }
  return absl::OkStatus();
}

// Adds an ended item to its job's counts.
absl::Status Count(const ItemEnd& end, StoreTransaction* transaction, v1::Job* job) {
  v1::JobCounts& counts = *job->mutable_counts();
  counts.set_pending(counts.pending() - 1);
  switch (end.result.state()) {
    case v1::ITEM_STATE_SUCCEEDED:
      counts.set_succeeded(counts.succeeded() + 1);
      job->set_prompt_tokens(job->prompt_tokens() + end.prompt_tokens);
      job->set_completion_tokens(job->completion_tokens() + end.completion_tokens);
      ++transaction->items_ended[0];
      return absl::OkStatus();
    case v1::ITEM_STATE_FAILED:
      counts.set_failed(counts.failed() + 1);
      ++transaction->items_ended[1];
      return absl::OkStatus();
    case v1::ITEM_STATE_CANCELLED:
      counts.set_cancelled(counts.cancelled() + 1);
      ++transaction->items_ended[2];
      return absl::OkStatus();
    case v1::ITEM_STATE_EXPIRED:
      counts.set_expired(counts.expired() + 1);
      ++transaction->items_ended[3];
      return absl::OkStatus();
    default:
      return absl::InvalidArgumentError(absl::StrCat("item ", end.result.index(), " cannot end ",
                                                     v1::ItemState_Name(end.result.state())));
  }
}

absl::Status EndOne(const ItemEnd& end, StoreTransaction* transaction, Rows* rows) {
  const int64_t index = end.result.index();
  ASSIGN_OR_RETURN(JobRow* const row, rows->Of(end.job, index));
  if (row == nullptr) return absl::OkStatus();
  int64_t attempts = 0;
  {
    SqliteQuery query = transaction->db->Query(
        "INSERT INTO progress (id, attempts, seed, state) VALUES (?, 0, 0, ?)"
        " ON CONFLICT (id) DO UPDATE SET state = excluded.state WHERE state = 0"
        " RETURNING attempts",
        RowOf(end.job, index), end.result.state());
    ASSIGN_OR_RETURN(const bool is_first, query.Step());
    if (!is_first) return absl::OkStatus();
    attempts = query.Int(0);
    RETURN_IF_ERROR(query.Finish());
  }
  v1::Job& job = row->record.job;
  RETURN_IF_ERROR(Count(end, transaction, &job));
  v1::ItemResult outcome = end.result;
  outcome.clear_index();
  outcome.clear_custom_id();
  outcome.clear_state();
  outcome.clear_attempts();
  RETURN_IF_ERROR(transaction->db->Run(
      "INSERT INTO results (id, item_index, state, attempts, outcome) VALUES (?, ?, ?, ?, ?)",
      RowOf(end.job, row->next_sequence++), index, end.result.state(), attempts,
      SqliteBlob{outcome.SerializeAsString()}));
  rows->Changed(end.job);
  if (job.counts().pending() > 0 || row->state() > v1::JOB_STATE_IN_PROGRESS) {
    return absl::OkStatus();
  }
  job.set_state(v1::JOB_STATE_FINALIZING);
  row->record.end_state = v1::JOB_STATE_COMPLETED;
  *job.mutable_finalize_time() = ToTimestamp(transaction->now);
  return absl::OkStatus();
}

absl::Status End(StoreTransaction* transaction, const std::vector<ItemEnd>& ends) {
  Rows rows(transaction);
  for (const ItemEnd& end : ends) RETURN_IF_ERROR(EndOne(end, transaction, &rows));
  return rows.Save();
}

}  // namespace

absl::StatusOr<std::vector<PendingItem>> BatchStore::ReadPending(JobId job, int64_t first_index,
                                                                 int limit,
                                                                 int64_t max_bytes) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  ASSIGN_OR_RETURN(const JobRow row, LoadJob(lease.db(), job));
  std::vector<PendingItem> items;
  int64_t bytes = 0;
  const auto read = [&](const PendingProgress& progress) -> absl::StatusOr<bool> {
    if (std::ssize(items) >= limit || (!items.empty() && bytes >= max_bytes)) return false;
    SqliteQuery query = lease.db()->Query("SELECT custom_id, request FROM items WHERE id = ?",
                                          RowOf(job, progress.index));
    ASSIGN_OR_RETURN(const bool has_row, query.Step());
    if (!has_row) return absl::DataLossError(absl::StrCat("item ", progress.index, " is missing"));
    items.push_back({.index = progress.index,
                     .custom_id = std::string(query.Text(0)),
                     .request = std::string(query.Text(1)),
                     .attempts = progress.attempts,
                     .seed = progress.seed});
    bytes += static_cast<int64_t>(items.back().request.size());
    return true;
  };
  RETURN_IF_ERROR(
      VisitPending(lease.db(), job, std::max(first_index, row.finalized), row.item_count(), read));
  return items;
}

void BatchStore::StartItems(std::vector<ItemStart> starts, Done done) {
  impl_->writer->Enqueue(
      0,
      [starts = std::move(starts)](StoreTransaction* transaction) {
        return Start(transaction, starts);
      },
      std::move(done));
}

void BatchStore::ReturnItems(std::vector<ItemStart> starts, Done done) {
  impl_->writer->Enqueue(
      0,
      [starts = std::move(starts)](StoreTransaction* transaction) {
        return Return(transaction, starts);
      },
      std::move(done));
}

void BatchStore::EndItems(std::vector<ItemEnd> ends, Done done) {
  size_t bytes = 0;
  for (const ItemEnd& end : ends) bytes += end.result.ByteSizeLong();
  impl_->writer->Enqueue(
      bytes,
      [ends = std::move(ends)](StoreTransaction* transaction) { return End(transaction, ends); },
      std::move(done));
}

absl::StatusOr<std::vector<BatchStore::Result>> BatchStore::ReadResults(JobId job, int64_t after,
                                                                        int limit,
                                                                        int64_t max_bytes) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  RETURN_IF_ERROR(LoadJob(lease.db(), job).status());
  SqliteQuery query = lease.db()->Query(
      "SELECT results.id, item_index, state, attempts, outcome, custom_id"
      " FROM results JOIN items ON items.id = ? + item_index"
      " WHERE results.id > ? AND results.id < ? ORDER BY results.id",
      RowOf(job, 0), RowOf(job, std::max<int64_t>(after, 0)), RowOf(job + 1, 0));
  std::vector<Result> results;
  int64_t bytes = 0;
  while (std::ssize(results) < limit && (results.empty() || bytes < max_bytes)) {
    ASSIGN_OR_RETURN(const bool has_row, query.Step());
    if (!has_row) break;
    Result result{.sequence = IndexOf(query.Int(0)), .result = {}};
    const std::string_view outcome = query.Text(4);
    if (!result.result.ParseFromArray(outcome.data(), static_cast<int>(outcome.size()))) {
      return absl::DataLossError(absl::StrCat("result ", result.sequence, " cannot be read"));
    }
    bytes += static_cast<int64_t>(outcome.size());
    result.result.set_index(query.Int(1));
    result.result.set_state(static_cast<v1::ItemState>(query.Int(2)));
    result.result.set_attempts(static_cast<int32_t>(query.Int(3)));
    result.result.set_custom_id(std::string(query.Text(5)));
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace latentd
