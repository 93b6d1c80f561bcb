#ifndef LATENTD_SERVER_BATCH_SQLITE_H_
#define LATENTD_SERVER_BATCH_SQLITE_H_

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace latentd {

// SQLite's error as a status: INTERNAL for what only a mistake of ours can cause (a constraint, a
// wrong statement), UNAVAILABLE with reason STORE_FAILED for what the disk or the system did.
absl::Status SqliteError(sqlite3* db, int code, std::string_view doing);
bool IsStoreFailure(const absl::Status& status);

// Writes a file's bytes once more and syncs it: then what can be read of it is on the disk, even
// when an earlier sync failed, after which the system counts pages as written that are not. No-op
// when there is no such file. No connection may be open.
absl::Status RewriteFile(const std::string& file, const std::string& vfs);

// One run of a prepared statement, from its first Step() to its end; makes it ready for the next
// run when it goes. Move-only; not longer than its connection, and one at a time of each statement.
//
//   SqliteQuery query = db.Query("SELECT name FROM jobs WHERE id < ?", id);
//   while (true) {
//     ASSIGN_OR_RETURN(const bool has_row, query.Step());
//     if (!has_row) break;
//     Use(query.Text(0));
//   }
class SqliteQuery {
 public:
  SqliteQuery(sqlite3* db, sqlite3_stmt* statement, absl::Status status)
      : db_(db), statement_(statement), status_(std::move(status)) {}
  SqliteQuery(SqliteQuery&& other) noexcept
      : db_(other.db_), statement_(other.statement_), status_(std::move(other.status_)) {
    other.statement_ = nullptr;
  }
  SqliteQuery& operator=(SqliteQuery&&) = delete;
  ~SqliteQuery();

  // True when there is a row, false after the last. An error of preparing or binding comes here.
  absl::StatusOr<bool> Step();
  // Steps to the end. Rows are passed over.
  absl::Status Finish();

  // Of the row, columns from 0. Valid until the next Step().
  int64_t Int(int column) const { return sqlite3_column_int64(statement_, column); }
  bool IsNull(int column) const { return sqlite3_column_type(statement_, column) == SQLITE_NULL; }
  std::string_view Text(int column) const;  // of a text or a blob

 private:
  friend class SqliteConnection;
  void Bind(int index, int64_t value);
  void Bind(int index, int value) { Bind(index, static_cast<int64_t>(value)); }
  void Bind(int index, std::string_view text);
  void Bind(int index, const std::string& text) { Bind(index, std::string_view(text)); }
  void Bind(int index, const char* text) { Bind(index, std::string_view(text)); }
  struct Blob;
  void Bind(int index, const struct SqliteBlob& blob);
  void Check(int code, std::string_view doing);

  sqlite3* db_;
  sqlite3_stmt* statement_;
  absl::Status status_;
};

// Bytes that are bound as a blob. They are not copied: they must outlive the run.
struct SqliteBlob {
  std::string_view bytes;
};

// A connection to a database, with the statements that it has prepared. One thread at a time.
class SqliteConnection {
 public:
  enum class Mode { kRead, kWrite };

  // `vfs` empty: the default. kWrite makes the file when it is not there.
  static absl::StatusOr<std::unique_ptr<SqliteConnection>> Open(const std::string& file,
                                                                const std::string& vfs, Mode mode);
  ~SqliteConnection();

  SqliteConnection(const SqliteConnection&) = delete;
  SqliteConnection& operator=(const SqliteConnection&) = delete;

  // Texts are copied. The statement is prepared once for each `sql`.
  template <typename... Values>
  SqliteQuery Query(std::string_view sql, const Values&... values) {
    SqliteQuery query = Prepare(sql);
    int index = 0;
    (query.Bind(++index, values), ...);
    return query;
  }
  // A statement without rows, or whose rows do not matter.
  template <typename... Values>
  absl::Status Run(std::string_view sql, const Values&... values) {
    return Query(sql, values...).Finish();
  }
  // Any number of statements, not kept.
  absl::Status Script(const std::string& sql);
  // The one number that a query gives.
  absl::StatusOr<int64_t> Number(std::string_view sql);

  // Whether the last connection moves the journal into the database when it closes; else, and by
  // default, it stays for the next.
  void MoveJournalOnClose(bool move);
  sqlite3* get() { return db_; }

 private:
  explicit SqliteConnection(sqlite3* db) : db_(db) {}
  SqliteQuery Prepare(std::string_view sql);

  sqlite3* const db_;
  absl::flat_hash_map<std::string, sqlite3_stmt*> statements_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_SQLITE_H_
