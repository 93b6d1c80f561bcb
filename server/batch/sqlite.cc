#include "server/batch/sqlite.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/status.h"

namespace latentd {
namespace {

constexpr std::string_view kStoreFailed = "STORE_FAILED";
// Only a program beside this one, such as an administrator's shell, makes a connection wait.
constexpr int kBusyTimeoutMs = 10'000;
constexpr size_t kMaxDoingBytes = 100;  // of a statement in an error

bool IsOurMistake(int code) {
  switch (code & 0xFF) {
    case SQLITE_ERROR:
    case SQLITE_CONSTRAINT:
    case SQLITE_MISMATCH:
    case SQLITE_MISUSE:
    case SQLITE_RANGE:
    case SQLITE_TOOBIG:
      return true;
    default:
      return false;
  }
}

}  // namespace

absl::Status SqliteError(sqlite3* db, int code, std::string_view doing) {
  const std::string what =
      absl::StrCat(db != nullptr ? sqlite3_errmsg(db) : sqlite3_errstr(code), " (", code,
                   "): ", std::string(doing.substr(0, kMaxDoingBytes)));
  if (IsOurMistake(code)) return absl::InternalError(what);
  return MakeError(absl::StatusCode::kUnavailable, std::string(kStoreFailed),
                   absl::StrCat("the store of batch jobs failed: ", what));
}

bool IsStoreFailure(const absl::Status& status) {
  return absl::IsUnavailable(status) && ErrorReason(status) == kStoreFailed;
}

// Through SQLite's file system, that what stands in for it in tests sees it too.
absl::Status RewriteFile(const std::string& file, const std::string& vfs_name) {
  sqlite3_vfs* const vfs = sqlite3_vfs_find(vfs_name.empty() ? nullptr : vfs_name.c_str());
  if (vfs == nullptr) return SqliteError(nullptr, SQLITE_CANTOPEN, "find the file system");
  int exists = 0;
  int code = vfs->xAccess(vfs, file.c_str(), SQLITE_ACCESS_EXISTS, &exists);
  if (code != SQLITE_OK) return SqliteError(nullptr, code, absl::StrCat("look for ", file));
  if (exists == 0) return absl::OkStatus();
  std::string name = file;
  name.append(4, '\0');  // SQLite looks for parameters behind a name
  std::vector<sqlite3_int64> memory(static_cast<size_t>(vfs->szOsFile) / sizeof(sqlite3_int64) + 1);
  auto* const opened = reinterpret_cast<sqlite3_file*>(memory.data());
  code = vfs->xOpen(vfs, name.c_str(), opened, SQLITE_OPEN_READWRITE | SQLITE_OPEN_WAL, nullptr);
  if (code != SQLITE_OK) return SqliteError(nullptr, code, absl::StrCat("open ", file));
  const sqlite3_io_methods& io = *opened->pMethods;
  sqlite3_int64 size = 0;
  code = io.xFileSize(opened, &size);
  std::vector<char> bytes(size_t{1} << 16);
  for (sqlite3_int64 at = 0; code == SQLITE_OK && at < size;) {
    const int count = static_cast<int>(std::min<sqlite3_int64>(size - at, std::ssize(bytes)));
    code = io.xRead(opened, bytes.data(), count, at);
    if (code == SQLITE_OK) code = io.xWrite(opened, bytes.data(), count, at);
    at += count;
  }
  if (code == SQLITE_OK) code = io.xSync(opened, SQLITE_SYNC_FULL);
  io.xClose(opened);
  return code == SQLITE_OK ? absl::OkStatus()
                           : SqliteError(nullptr, code, absl::StrCat("rewrite ", file));
}

// ---- SqliteQuery -----------------------------------------------------------------------------

SqliteQuery::~SqliteQuery() {
  if (statement_ == nullptr) return;
  sqlite3_reset(statement_);  // says again what Step() said
  sqlite3_clear_bindings(statement_);
}

absl::StatusOr<bool> SqliteQuery::Step() {
  RETURN_IF_ERROR(status_);
  const int code = sqlite3_step(statement_);
  if (code == SQLITE_ROW) return true;
  if (code == SQLITE_DONE) return false;
  Check(code, sqlite3_sql(statement_));
  return status_;
}

absl::Status SqliteQuery::Finish() {
  while (true) {
    ASSIGN_OR_RETURN(const bool has_row, Step());
    if (!has_row) return absl::OkStatus();
  }
}

std::string_view SqliteQuery::Text(int column) const {
  const void* const bytes = sqlite3_column_blob(statement_, column);
  const int size = sqlite3_column_bytes(statement_, column);
  return size == 0 ? std::string_view()
                   : std::string_view(static_cast<const char*>(bytes), static_cast<size_t>(size));
}

void SqliteQuery::Bind(int index, int64_t value) {
  if (status_.ok()) Check(sqlite3_bind_int64(statement_, index, value), "bind");
}

void SqliteQuery::Bind(int index, std::string_view text) {
  if (!status_.ok()) return;
  // A null pointer would be NULL, not an empty text.
  Check(sqlite3_bind_text64(statement_, index, text.empty() ? "" : text.data(), text.size(),
                            SQLITE_TRANSIENT, SQLITE_UTF8),
        "bind");
}

void SqliteQuery::Bind(int index, const SqliteBlob& blob) {
  if (!status_.ok()) return;
  Check(sqlite3_bind_blob64(statement_, index, blob.bytes.empty() ? "" : blob.bytes.data(),
                            blob.bytes.size(), SQLITE_STATIC),
        "bind");
}

void SqliteQuery::Check(int code, std::string_view doing) {
  if (code != SQLITE_OK) status_ = SqliteError(db_, code, doing);
}

// ---- SqliteConnection ------------------------------------------------------------------------

absl::StatusOr<std::unique_ptr<SqliteConnection>> SqliteConnection::Open(const std::string& file,
                                                                         const std::string& vfs,
                                                                         Mode mode) {
  const int flags =
      SQLITE_OPEN_NOMUTEX | SQLITE_OPEN_EXRESCODE |
      (mode == Mode::kWrite ? SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE : SQLITE_OPEN_READONLY);
  sqlite3* db = nullptr;
  const int code = sqlite3_open_v2(file.c_str(), &db, flags, vfs.empty() ? nullptr : vfs.c_str());
  std::unique_ptr<SqliteConnection> connection(new SqliteConnection(db));
  if (code != SQLITE_OK) return SqliteError(db, code, absl::StrCat("open ", file));
  sqlite3_busy_timeout(db, kBusyTimeoutMs);
  connection->MoveJournalOnClose(false);
  return connection;
}

SqliteConnection::~SqliteConnection() {
  for (const auto& [sql, statement] : statements_) sqlite3_finalize(statement);
  sqlite3_close(db_);
}

absl::Status SqliteConnection::Script(const std::string& sql) {
  const int code = sqlite3_exec(db_, sql.c_str(), nullptr, nullptr, nullptr);
  return code == SQLITE_OK ? absl::OkStatus() : SqliteError(db_, code, sql);
}

absl::StatusOr<int64_t> SqliteConnection::Number(std::string_view sql) {
  SqliteQuery query = Query(sql);
  ASSIGN_OR_RETURN(const bool has_row, query.Step());
  if (!has_row) return absl::InternalError(absl::StrCat("no row: ", std::string(sql)));
  return query.Int(0);
}

void SqliteConnection::MoveJournalOnClose(bool move) {
  sqlite3_db_config(db_, SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, move ? 0 : 1, nullptr);
}

SqliteQuery SqliteConnection::Prepare(std::string_view sql) {
  sqlite3_stmt*& statement = statements_[std::string(sql)];
  if (statement == nullptr) {
    const int code = sqlite3_prepare_v3(db_, sql.data(), static_cast<int>(sql.size()),
                                        SQLITE_PREPARE_PERSISTENT, &statement, nullptr);
    if (code != SQLITE_OK) {
      absl::Status error = SqliteError(db_, code, sql);
      statements_.erase(std::string(sql));
      return SqliteQuery(db_, nullptr, std::move(error));
    }
  }
  return SqliteQuery(db_, statement, absl::OkStatus());
}

}  // namespace latentd
