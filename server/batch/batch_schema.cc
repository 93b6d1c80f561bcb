#include "server/batch/batch_schema.h"

#include <iterator>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

constexpr int64_t kApplicationId = 0x6C747464;  // "lttd": which program's file this is

// Step i brings a store of version i to version i + 1. A step that was released never changes.
//
// Rows of an item and of a result are found by job * 2^32 + (index or sequence): a job's rows lie
// side by side, appends go to the end of the table, and no other index is kept. The bytes of a
// request are written once; what becomes of the item is in `progress`.
constexpr const char* kSteps[] = {
    R"sql(
CREATE TABLE jobs (
  id INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again
  name TEXT NOT NULL UNIQUE,
  owner TEXT NOT NULL,
  request_id TEXT NOT NULL,
  spec BLOB NOT NULL,                    -- a JobSpec
  retry_of TEXT NOT NULL,                -- the name of the job whose items it takes, or empty
  retry_source INTEGER NOT NULL,         -- its id, or 0
  retry_next INTEGER NOT NULL,           -- index in it of what is to be taken next
  state INTEGER NOT NULL,                -- JobState
  end_state INTEGER NOT NULL,            -- what FINALIZING and CANCELLING end in, or 0
  reason TEXT NOT NULL,
  revision INTEGER NOT NULL,
  item_count INTEGER NOT NULL,
  chain BLOB NOT NULL,                   -- over the items, see item_chain.h
  succeeded INTEGER NOT NULL,
  failed INTEGER NOT NULL,
  cancelled INTEGER NOT NULL,
  expired INTEGER NOT NULL,
  next_sequence INTEGER NOT NULL,        -- of the next result, from 1
  finalized INTEGER NOT NULL,            -- all items below this index have a result
  prompt_tokens INTEGER NOT NULL,
  completion_tokens INTEGER NOT NULL,
  recoveries INTEGER NOT NULL,
  touch_time INTEGER NOT NULL,           -- of the last append; times are Unix microseconds, 0: unset
  create_time INTEGER NOT NULL,
  start_time INTEGER NOT NULL,
  finalize_time INTEGER NOT NULL,
  end_time INTEGER NOT NULL,
  expire_time INTEGER NOT NULL,
  purge_time INTEGER NOT NULL,
  UNIQUE (owner, request_id)
);
CREATE TABLE items (
  id INTEGER PRIMARY KEY,                -- job * 2^32 + index
  custom_id TEXT NOT NULL,
  request BLOB NOT NULL                  -- a BatchItem, as it was sent
);
CREATE TABLE progress (                  -- of items that were begun or have a result
  id INTEGER PRIMARY KEY,                -- as in items
  attempts INTEGER NOT NULL,
  seed INTEGER NOT NULL,
  state INTEGER NOT NULL                 -- ItemState of the result, or 0
);
CREATE TABLE results (
  id INTEGER PRIMARY KEY,                -- job * 2^32 + sequence
  item_index INTEGER NOT NULL,
  state INTEGER NOT NULL,
  attempts INTEGER NOT NULL,
  outcome BLOB NOT NULL                  -- an ItemResult of its outcome alone
);
CREATE TABLE deleted (                   -- jobs that are gone, whose other rows are still there
  job INTEGER PRIMARY KEY
);
)sql",
    // Ended jobs are kept for long, and there may be very many of them: what looks for the others,
    // or for those that are due, does not read them all.
    R"sql(
CREATE INDEX jobs_not_ended ON jobs (owner) WHERE state < 6;
CREATE INDEX jobs_to_purge ON jobs (purge_time) WHERE purge_time != 0;
)sql",
};

}  // namespace

int32_t BatchSchemaVersion() { return static_cast<int32_t>(std::size(kSteps)); }

absl::Status CheckBatchSchema(SqliteConnection* db) {
  ASSIGN_OR_RETURN(const int64_t version, db->Number("PRAGMA user_version"));
  ASSIGN_OR_RETURN(const int64_t id, db->Number("PRAGMA application_id"));
  ASSIGN_OR_RETURN(const int64_t num_tables, db->Number("SELECT count(*) FROM sqlite_schema"));
  if (version == 0 && num_tables == 0) return absl::OkStatus();  // new
  if (id != kApplicationId) {
    return absl::FailedPreconditionError("the database is not a store of batch jobs");
  }
  if (version > BatchSchemaVersion()) {
    return absl::FailedPreconditionError(
        absl::StrCat("the store of batch jobs has version ", version,
                     ": a newer latentd wrote it; this one knows up to ", BatchSchemaVersion()));
  }
  return absl::OkStatus();
}

absl::Status MigrateBatchSchema(SqliteConnection* db, int32_t version) {
  ASSIGN_OR_RETURN(const int64_t found, db->Number("PRAGMA user_version"));
  for (int64_t step = found; step < version; ++step) {
    absl::Status status = db->Script(
        absl::StrCat("BEGIN IMMEDIATE;", kSteps[step], "PRAGMA application_id = ", kApplicationId,
                     "; PRAGMA user_version = ", step + 1, "; COMMIT;"));
    if (!status.ok()) {
      db->Script("ROLLBACK").IgnoreError();
      return status;
    }
  }
  return absl::OkStatus();
}

}  // namespace latentd
