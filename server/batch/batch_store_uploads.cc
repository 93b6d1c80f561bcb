#include <openssl/rand.h>

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "absl/hash/hash.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "google/protobuf/util/message_differencer.h"
#include "google/protobuf/util/time_util.h"
#include "server/batch/batch_store.h"
#include "server/batch/batch_store_impl.h"
#include "server/batch/item_chain.h"
#include "server/status.h"

namespace latentd {
namespace {

BatchStore::Upload ToUpload(JobRow row, bool is_new) {
  const int64_t item_count = row.item_count();
  return {.record = std::move(row.record),
          .item_count = item_count,
          .sha256 = std::move(row.chain),
          .is_new = is_new};
}

absl::Status NotUploading(const JobRow& row) {
  return MakeError(absl::StatusCode::kFailedPrecondition, "UPLOAD_COMMITTED",
                   "the upload was committed already", {{"job", row.record.job.name()}});
}

absl::Status Append(StoreTransaction* transaction, JobId job, int64_t first,
                    const std::vector<NewItem>& items) {
  ASSIGN_OR_RETURN(JobRow row, LoadJob(transaction->db, job));
  if (row.state() != v1::JOB_STATE_VALIDATING || row.retry_source != 0) return NotUploading(row);
  if (first != row.item_count()) {
    return MakeError(
        absl::StatusCode::kFailedPrecondition, "UPLOAD_CONFLICT",
        absl::StrCat("the upload has ", row.item_count(), " items, not ", first,
                     ": another call uploads too"),
        {{"first_item", absl::StrCat(first)}, {"item_count", absl::StrCat(row.item_count())}});
  }
  if (static_cast<int64_t>(items.size()) > kMaxItemsOfJob - first) {
    return absl::ResourceExhaustedError(
        absl::StrCat("a job has at most ", kMaxItemsOfJob, " items"));
  }
  ItemChain chain(row.chain);
  int64_t index = first;
  for (const NewItem& item : items) {
    RETURN_IF_ERROR(
        transaction->db->Run("INSERT INTO items (id, custom_id, request) VALUES (?, ?, ?)",
                             RowOf(job, index++), item.custom_id, SqliteBlob{item.request}));
    chain.Add(item.request);
  }
  row.record.job.mutable_counts()->set_total(index);
  row.chain = chain.value();
  row.touch_time = transaction->now;
  return SaveJob(transaction, &row);
}

absl::Status RefuseCount(int64_t stored, int64_t said) {
  return MakeBadRequest(
      {{.field = "commit.item_count",
        .description = absl::StrCat("is ", said, "; ", stored, " items are stored")}});
}

absl::Status RefuseDuplicates(const std::vector<BatchStore::Duplicate>& duplicates) {
  std::vector<FieldViolation> violations;
  for (const BatchStore::Duplicate& duplicate : duplicates) {
    violations.push_back(
        {.field = absl::StrCat("items[", duplicate.index, "].custom_id"),
         .description = absl::StrCat("is '", duplicate.custom_id, "', as that of item ",
                                     duplicate.first_index)});
  }
  return MakeBadRequest(violations);
}

absl::StatusOr<std::string> CustomId(SqliteConnection* db, JobId job, int64_t index) {
  SqliteQuery query = db->Query("SELECT custom_id FROM items WHERE id = ?", RowOf(job, index));
  ASSIGN_OR_RETURN(const bool has_row, query.Step());
  if (!has_row) return absl::DataLossError(absl::StrCat("item ", index, " is missing"));
  return std::string(query.Text(0));
}

struct HashedId {
  uint64_t hash;
  int64_t index;
  auto operator<=>(const HashedId&) const = default;
};

// Of [begin, end), items with the same hash in order: those whose text an earlier one has.
absl::Status CompareIds(SqliteConnection* db, JobId job, const HashedId* begin, const HashedId* end,
                        std::vector<BatchStore::Duplicate>* duplicates) {
  std::vector<std::pair<std::string, int64_t>> seen;  // one, unless hashes collide
  for (const HashedId* id = begin; id != end; ++id) {
    ASSIGN_OR_RETURN(std::string text, CustomId(db, job, id->index));
    const auto first = std::find_if(seen.begin(), seen.end(),
                                    [&](const auto& entry) { return entry.first == text; });
    if (first == seen.end()) {
      seen.emplace_back(std::move(text), id->index);
    } else {
      duplicates->push_back(
          {.index = id->index, .first_index = first->second, .custom_id = std::move(text)});
    }
  }
  return absl::OkStatus();
}

}  // namespace

std::string NewJobName() {
  unsigned char bytes[16];
  LATENTD_CHECK(RAND_bytes(bytes, sizeof(bytes)) == 1);
  return absl::StrCat("jobs/", absl::BytesToHexString(absl::string_view(
                                   reinterpret_cast<const char*>(bytes), sizeof(bytes))));
}

absl::Status SaveJob(StoreTransaction* transaction, JobRow* row) {
  transaction->changed.push_back(row->record.id);
  return SaveJob(transaction->db, row);
}

google::protobuf::Timestamp ToTimestamp(absl::Time time) {
  return google::protobuf::util::TimeUtil::MicrosecondsToTimestamp(absl::ToUnixMicros(time));
}

void CommitRow(absl::Time now, JobRow* row) {
  v1::Job& job = row->record.job;
  job.set_state(v1::JOB_STATE_QUEUED);
  *job.mutable_create_time() = ToTimestamp(now);
  if (job.spec().has_completion_window()) {
    *job.mutable_expire_time() = job.create_time() + job.spec().completion_window();
  }
}

// By hashes, because an index of texts in any order would have to be written with each append: a
// page of it for nearly every item of a large job.
absl::StatusOr<std::vector<BatchStore::Duplicate>> FindDuplicates(SqliteConnection* db, JobId job,
                                                                  int64_t item_count, int limit) {
  std::vector<HashedId> ids;
  ids.reserve(static_cast<size_t>(item_count));
  SqliteQuery query = db->Query("SELECT custom_id FROM items WHERE id >= ? AND id < ? ORDER BY id",
                                RowOf(job, 0), RowOf(job, item_count));
  while (true) {
    ASSIGN_OR_RETURN(const bool has_row, query.Step());
    if (!has_row) break;
    ids.push_back({.hash = absl::Hash<std::string_view>()(query.Text(0)),
                   .index = static_cast<int64_t>(ids.size())});
  }
  std::sort(ids.begin(), ids.end());
  std::vector<BatchStore::Duplicate> duplicates;
  for (auto begin = ids.begin(); begin != ids.end();) {
    const auto end =
        std::find_if(begin, ids.end(), [&](const HashedId& id) { return id.hash != begin->hash; });
    if (end - begin > 1) {
      RETURN_IF_ERROR(CompareIds(db, job, &*begin, &*begin + (end - begin), &duplicates));
    }
    begin = end;
  }
  std::sort(duplicates.begin(), duplicates.end(),
            [](const auto& a, const auto& b) { return a.index < b.index; });
  if (std::ssize(duplicates) > limit) duplicates.resize(static_cast<size_t>(limit));
  return duplicates;
}

absl::StatusOr<BatchStore::Upload> BatchStore::OpenUpload(std::string_view owner,
                                                          std::string_view request_id,
                                                          const v1::JobSpec& spec) {
  return impl_->Write<Upload>([&](StoreTransaction* transaction) -> absl::StatusOr<Upload> {
    ASSIGN_OR_RETURN(std::optional<JobRow> found, FindJob(transaction->db, owner, request_id));
    if (found.has_value()) {
      if (found->retry_source != 0 ||
          !google::protobuf::util::MessageDifferencer::Equals(found->record.job.spec(), spec)) {
        return MakeError(absl::StatusCode::kAlreadyExists, "REQUEST_ID_USED",
                         "the request_id is that of another job",
                         {{"request_id", std::string(request_id)}});
      }
      return ToUpload(*std::move(found), false);
    }
    JobRow row;
    row.record.owner = std::string(owner);
    v1::Job& job = row.record.job;
    job.set_name(NewJobName());
    job.set_request_id(std::string(request_id));
    *job.mutable_spec() = spec;
    job.set_state(v1::JOB_STATE_VALIDATING);
    row.touch_time = transaction->now;
    RETURN_IF_ERROR(InsertJob(transaction->db, &row));
    transaction->changed.push_back(row.record.id);
    return ToUpload(std::move(row), true);
  });
}

absl::StatusOr<BatchStore::Upload> BatchStore::GetUpload(std::string_view owner,
                                                         std::string_view request_id) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  ASSIGN_OR_RETURN(std::optional<JobRow> row, FindJob(lease.db(), owner, request_id));
  if (!row.has_value()) {
    return MakeError(absl::StatusCode::kNotFound, "UPLOAD_NOT_FOUND",
                     "there is no upload of this request_id",
                     {{"request_id", std::string(request_id)}});
  }
  return ToUpload(*std::move(row), false);
}

void BatchStore::AppendItems(JobId job, int64_t first, std::vector<NewItem> items, Done done) {
  size_t bytes = 0;
  for (const NewItem& item : items) bytes += item.custom_id.size() + item.request.size();
  impl_->writer->Enqueue(
      bytes,
      [job, first, items = std::move(items)](StoreTransaction* transaction) {
        return Append(transaction, job, first, items);
      },
      std::move(done));
}

absl::StatusOr<std::string> BatchStore::ChainOf(JobId job, int64_t count) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  ASSIGN_OR_RETURN(const JobRow row, LoadJob(lease.db(), job));
  if (count == row.item_count()) return row.chain;
  if (count < 0 || count > row.item_count()) {
    return absl::OutOfRangeError(
        absl::StrCat(row.item_count(), " items are stored, fewer than ", count));
  }
  ItemChain chain;
  SqliteQuery query =
      lease.db()->Query("SELECT request FROM items WHERE id >= ? AND id < ? ORDER BY id",
                        RowOf(job, 0), RowOf(job, count));
  while (true) {
    ASSIGN_OR_RETURN(const bool has_row, query.Step());
    if (!has_row) return chain.value();
    chain.Add(query.Text(0));
  }
}

absl::StatusOr<std::vector<BatchStore::Duplicate>> BatchStore::FindDuplicates(JobId job,
                                                                              int limit) const {
  ReadPool::Lease lease = impl_->readers.Take();
  RETURN_IF_ERROR(lease.status());
  ASSIGN_OR_RETURN(const JobRow row, LoadJob(lease.db(), job));
  return latentd::FindDuplicates(lease.db(), job, row.item_count(), limit);
}

absl::StatusOr<JobRecord> BatchStore::CommitUpload(JobId job, int64_t item_count,
                                                   int max_violations) {
  // Read aside: the writer is not held by a large job. Nothing can change what was read but an
  // append, and then the count is another.
  {
    ReadPool::Lease lease = impl_->readers.Take();
    RETURN_IF_ERROR(lease.status());
    ASSIGN_OR_RETURN(const JobRow row, LoadJob(lease.db(), job));
    if (row.item_count() != item_count || item_count < 1) {
      return RefuseCount(row.item_count(), item_count);
    }
    if (row.state() != v1::JOB_STATE_VALIDATING) return row.record;
    ASSIGN_OR_RETURN(
        const std::vector<Duplicate> duplicates,
        latentd::FindDuplicates(lease.db(), job, item_count, std::max(1, max_violations)));
    if (!duplicates.empty()) return RefuseDuplicates(duplicates);
  }
  return impl_->Write<JobRecord>([&](StoreTransaction* transaction) -> absl::StatusOr<JobRecord> {
    ASSIGN_OR_RETURN(JobRow row, LoadJob(transaction->db, job));
    if (row.item_count() != item_count) return RefuseCount(row.item_count(), item_count);
    if (row.retry_source != 0) return NotUploading(row);
    if (row.state() != v1::JOB_STATE_VALIDATING) return row.record;
    CommitRow(transaction->now, &row);
    RETURN_IF_ERROR(SaveJob(transaction, &row));
    return row.record;
  });
}

absl::Status BatchStore::AbandonUpload(JobId job) {
  return impl_->writer->Run([job](StoreTransaction* transaction) -> absl::Status {
    ASSIGN_OR_RETURN(const std::optional<JobRow> row, FindJob(transaction->db, job));
    if (!row.has_value() || row->state() != v1::JOB_STATE_VALIDATING) return absl::OkStatus();
    return RemoveJob(transaction, job);
  });
}

}  // namespace latentd
