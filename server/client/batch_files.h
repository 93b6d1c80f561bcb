#ifndef LATENTD_SERVER_CLIENT_BATCH_FILES_H_
#define LATENTD_SERVER_CLIENT_BATCH_FILES_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace latentd {

// How far a job's results have been taken, in a file of JSON that is replaced as a whole.
struct ResultsCursor {
  std::string job;
  std::string cursor;        // StreamResultsResponse.cursor; empty: none yet
  int64_t output_bytes = 0;  // of an export's files, where they end with this cursor
  int64_t errors_bytes = 0;
};

// NOT_FOUND when there is no such file. FAILED_PRECONDITION when it is of another job than
// `cursor->job`, or no cursor.
absl::Status ReadCursor(const std::string& path, ResultsCursor* cursor);
absl::Status WriteCursor(const std::string& path, const ResultsCursor& cursor);

// The files of an export: whatever ends the program, or the machine, the next run goes on where the
// cursor is, and every line is there once.
class ExportFiles {
 public:
  // Cuts files that are there to where the cursor was written. ALREADY_EXISTS when there are files
  // and no cursor. With `overwrite` they begin anew, whatever is there.
  static absl::StatusOr<ExportFiles> Open(std::string_view prefix, const std::string& job,
                                          bool overwrite);
  ExportFiles(ExportFiles&& other) noexcept;
  ~ExportFiles();

  const std::string& cursor() const { return cursor_.cursor; }
  const std::string& output_path() const { return output_.path; }
  const std::string& errors_path() const { return errors_.path; }

  // Lines for both files, on stable storage with the cursor that follows them at the return.
  absl::Status Append(std::string_view output, std::string_view errors, const std::string& cursor);
  // Nothing follows: the cursor goes.
  void Finish();

 private:
  struct File {
    std::string path;
    int fd = -1;

    absl::Status OpenAt(int64_t size);
    absl::Status Append(std::string_view text, int64_t* size);
  };

  ExportFiles() = default;

  std::string cursor_path_;
  ResultsCursor cursor_;
  File output_, errors_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_FILES_H_
