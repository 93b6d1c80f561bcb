#include "server/batch/job_row.h"

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "google/protobuf/util/time_util.h"
#include "server/status.h"

namespace latentd {
namespace {

using ::google::protobuf::Timestamp;

constexpr std::string_view kSelect =
    "SELECT id, name, owner, request_id, spec, retry_of, retry_source, retry_next, state,"
    " end_state, reason, revision, item_count, chain, succeeded, failed, cancelled, expired,"
    " next_sequence, finalized, prompt_tokens, completion_tokens, recoveries, touch_time,"
    " create_time, start_time, finalize_time, end_time, expire_time, purge_time FROM jobs ";

int64_t ToMicros(const Timestamp& time) {
  return google::protobuf::util::TimeUtil::TimestampToMicroseconds(time);
}

void SetTime(int64_t micros, Timestamp* (v1::Job::*field)(), v1::Job* job) {
  if (micros == 0) return;
  *(job->*field)() = google::protobuf::util::TimeUtil::MicrosecondsToTimestamp(micros);
}

std::string Etag(int64_t revision) { return absl::StrCat(absl::Hex(revision, absl::kZeroPad16)); }

absl::StatusOr<JobRow> ReadRow(const SqliteQuery& query) {
  JobRow row;
  v1::Job& job = row.record.job;
  int column = 0;
  const auto text = [&] { return std::string(query.Text(column++)); };
  const auto number = [&] { return query.Int(column++); };
  row.record.id = number();
  job.set_name(text());
  row.record.owner = text();
  job.set_request_id(text());
  if (!job.mutable_spec()->ParseFromString(text())) {
    return absl::DataLossError(absl::StrCat("the spec of ", job.name(), " cannot be read"));
  }
  job.set_retry_of(text());
  row.retry_source = number();
  row.retry_next = number();
  job.set_state(static_cast<v1::JobState>(number()));
  row.record.end_state = static_cast<v1::JobState>(number());
  job.set_state_reason(text());
  job.set_revision(number());
  job.set_etag(Etag(job.revision()));
  v1::JobCounts& counts = *job.mutable_counts();
  counts.set_total(number());
  row.chain = text();
  counts.set_succeeded(number());
  counts.set_failed(number());
  counts.set_cancelled(number());
  counts.set_expired(number());
  counts.set_pending(counts.total() - counts.succeeded() - counts.failed() - counts.cancelled() -
                     counts.expired());
  row.next_sequence = number();
  row.finalized = number();
  job.set_prompt_tokens(number());
  job.set_completion_tokens(number());
  job.set_recoveries(static_cast<int32_t>(number()));
  row.touch_time = absl::FromUnixMicros(number());
  SetTime(number(), &v1::Job::mutable_create_time, &job);
  SetTime(number(), &v1::Job::mutable_start_time, &job);
  SetTime(number(), &v1::Job::mutable_finalize_time, &job);
  SetTime(number(), &v1::Job::mutable_end_time, &job);
  SetTime(number(), &v1::Job::mutable_expire_time, &job);
  SetTime(number(), &v1::Job::mutable_purge_time, &job);
  return row;
}

absl::Status NoSuchJob(std::string_view which) {
  const std::string name(which);
  return MakeError(absl::StatusCode::kNotFound, "JOB_NOT_FOUND",
                   absl::StrCat("there is no job ", name), {{"job", name}});
}

}  // namespace

std::string_view SelectJobs() { return kSelect; }

absl::StatusOr<std::optional<JobRow>> NextJob(SqliteQuery* query) {
  ASSIGN_OR_RETURN(const bool has_row, query->Step());
  if (!has_row) return std::nullopt;
  ASSIGN_OR_RETURN(JobRow row, ReadRow(*query));
  return row;
}

absl::StatusOr<std::optional<JobRow>> FindJob(SqliteConnection* db, JobId id) {
  SqliteQuery query = db->Query(absl::StrCat(std::string(kSelect), "WHERE id = ?"), id);
  return NextJob(&query);
}

absl::StatusOr<std::optional<JobRow>> FindJob(SqliteConnection* db, std::string_view owner,
                                              std::string_view request_id) {
  SqliteQuery query = db->Query(
      absl::StrCat(std::string(kSelect), "WHERE owner = ? AND request_id = ?"), owner, request_id);
  return NextJob(&query);
}

absl::StatusOr<JobRow> LoadJob(SqliteConnection* db, JobId id) {
  ASSIGN_OR_RETURN(std::optional<JobRow> row, FindJob(db, id));
  if (!row.has_value()) return NoSuchJob(absl::StrCat("of id ", id));
  return *std::move(row);
}

absl::StatusOr<JobRow> LoadJob(SqliteConnection* db, std::string_view name) {
  SqliteQuery query = db->Query(absl::StrCat(std::string(kSelect), "WHERE name = ?"), name);
  ASSIGN_OR_RETURN(std::optional<JobRow> row, NextJob(&query));
  if (!row.has_value()) return NoSuchJob(name);
  return *std::move(row);
}

absl::Status InsertJob(SqliteConnection* db, JobRow* row) {
  const v1::Job& job = row->record.job;
  RETURN_IF_ERROR(db->Run(
      "INSERT INTO jobs (name, owner, request_id, spec, retry_of, retry_source, retry_next, state,"
      " end_state, reason, revision, item_count, chain, succeeded, failed, cancelled, expired,"
      " next_sequence, finalized, prompt_tokens, completion_tokens, recoveries, touch_time,"
      " create_time, start_time, finalize_time, end_time, expire_time, purge_time)"
      " VALUES (?, ?, ?, ?, ?, ?, 0, ?, 0, '', 0, 0, x'', 0, 0, 0, 0, 1, 0, 0, 0, 0, ?,"
      " 0, 0, 0, 0, 0, 0)",
      job.name(), row->record.owner, job.request_id(), SqliteBlob{job.spec().SerializeAsString()},
      job.retry_of(), row->retry_source, job.state(), absl::ToUnixMicros(row->touch_time)));
  row->record.id = sqlite3_last_insert_rowid(db->get());
  return SaveJob(db, row);
}

absl::Status SaveJob(SqliteConnection* db, JobRow* row) {
  v1::Job& job = row->record.job;
  v1::JobCounts& counts = *job.mutable_counts();
  counts.set_pending(counts.total() - counts.succeeded() - counts.failed() - counts.cancelled() -
                     counts.expired());
  job.set_revision(job.revision() + 1);
  job.set_etag(Etag(job.revision()));
  return db->Run(
      "UPDATE jobs SET retry_next = ?, state = ?, end_state = ?, reason = ?, revision = ?,"
      " item_count = ?, chain = ?, succeeded = ?, failed = ?, cancelled = ?, expired = ?,"
      " next_sequence = ?, finalized = ?, prompt_tokens = ?, completion_tokens = ?,"
      " recoveries = ?, touch_time = ?, create_time = ?, start_time = ?, finalize_time = ?,"
      " end_time = ?, expire_time = ?, purge_time = ? WHERE id = ?",
      row->retry_next, job.state(), row->record.end_state, job.state_reason(), job.revision(),
      counts.total(), SqliteBlob{row->chain}, counts.succeeded(), counts.failed(),
      counts.cancelled(), counts.expired(), row->next_sequence, row->finalized, job.prompt_tokens(),
      job.completion_tokens(), job.recoveries(), absl::ToUnixMicros(row->touch_time),
      ToMicros(job.create_time()), ToMicros(job.start_time()), ToMicros(job.finalize_time()),
      ToMicros(job.end_time()), ToMicros(job.expire_time()), ToMicros(job.purge_time()),
      row->record.id);
}

absl::Status VisitPending(SqliteConnection* db, JobId job, int64_t first, int64_t item_count,
                          absl::FunctionRef<absl::StatusOr<bool>(const PendingProgress&)> visit) {
  SqliteQuery query = db->Query(
      "SELECT id, attempts, seed, state FROM progress WHERE id >= ? AND id < ? ORDER BY id",
      RowOf(job, first), RowOf(job, item_count));
  ASSIGN_OR_RETURN(bool has_row, query.Step());
  for (int64_t index = first; index < item_count; ++index) {
    PendingProgress pending{.index = index};
    bool has_result = false;
    if (has_row && IndexOf(query.Int(0)) == index) {
      pending.attempts = static_cast<int32_t>(query.Int(1));
      pending.seed = static_cast<uint64_t>(query.Int(2));
      has_result = query.Int(3) != 0;
      ASSIGN_OR_RETURN(has_row, query.Step());
    }
    if (has_result) continue;
    ASSIGN_OR_RETURN(const bool more, visit(pending));
    if (!more) break;
  }
  return absl::OkStatus();
}

}  // namespace latentd
