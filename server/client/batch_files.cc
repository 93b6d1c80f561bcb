#include "server/client/batch_files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

absl::Status FileError(absl::string_view what, const std::string& path) {
  return absl::DataLossError(absl::StrCat("cannot ", what, " ", path, ": ", std::strerror(errno)));
}

absl::Status WriteAll(int fd, std::string_view text, const std::string& path) {
  while (!text.empty()) {
    const ssize_t size = write(fd, text.data(), text.size());
    if (size < 0 && errno == EINTR) continue;
    if (size < 0) return FileError("write", path);
    text.remove_prefix(size);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadCursor(const std::string& path, ResultsCursor* cursor) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("cannot open ", path));
  std::stringstream text;
  text << file.rdbuf();
  const auto json = nlohmann::json::parse(text.str(), nullptr, /*allow_exceptions=*/false);
  if (!json.is_object() || !json.contains("job") || !json["job"].is_string() ||
      !json.contains("cursor") || !json["cursor"].is_string()) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is no cursor of a batch job"));
  }
  const std::string job = json["job"];
  if (job != cursor->job) {
    return absl::FailedPreconditionError(absl::StrCat(path, " is a cursor of ", job));
  }
  cursor->cursor = json["cursor"];
  const auto integer = [&json](const char* key) {
    return json.contains(key) && json[key].is_number_integer() ? json[key].get<int64_t>() : 0;
  };
  cursor->output_bytes = integer("output_bytes");
  cursor->errors_bytes = integer("errors_bytes");
  return absl::OkStatus();
}

absl::Status WriteCursor(const std::string& path, const ResultsCursor& cursor) {
  const nlohmann::json json = {{"job", cursor.job},
                               {"cursor", cursor.cursor},
                               {"output_bytes", cursor.output_bytes},
                               {"errors_bytes", cursor.errors_bytes}};
  const std::string temporary = absl::StrCat(path, ".new");
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
  if (fd < 0) return FileError("write", temporary);
  absl::Status status = WriteAll(fd, json.dump() + "\n", temporary);
  if (status.ok() && fsync(fd) != 0) status = FileError("write", temporary);
  close(fd);
  RETURN_IF_ERROR(status);
  if (std::rename(temporary.c_str(), path.c_str()) != 0) return FileError("replace", path);
  return absl::OkStatus();
}

absl::Status ExportFiles::File::OpenAt(int64_t size) {
  fd = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
  if (fd < 0) return FileError("open", path);
  const off_t end = lseek(fd, 0, SEEK_END);
  if (end < size) {
    return absl::DataLossError(absl::StrCat(path, " has ", end, " bytes; the cursor is at ", size,
                                            ": it was changed since"));
  }
  if (ftruncate(fd, size) != 0 || lseek(fd, size, SEEK_SET) != size) return FileError("cut", path);
  return absl::OkStatus();
}

absl::Status ExportFiles::File::Append(std::string_view text, int64_t* size) {
  if (text.empty()) return absl::OkStatus();
  RETURN_IF_ERROR(WriteAll(fd, text, path));
  // A pipe or a terminal has nothing to be kept.
  if (fdatasync(fd) != 0 && errno != EINVAL) return FileError("write", path);
  *size += static_cast<int64_t>(text.size());
  return absl::OkStatus();
}

absl::StatusOr<ExportFiles> ExportFiles::Open(std::string_view prefix, const std::string& job,
                                              bool overwrite) {
  if (prefix.ends_with(".jsonl")) prefix.remove_suffix(6);
  const std::string base(prefix);
  ExportFiles files;
  files.output_.path = base + ".output.jsonl";
  files.errors_.path = base + ".errors.jsonl";
  files.cursor_path_ = base + ".cursor";
  files.cursor_.job = job;
  if (!overwrite) {
    const absl::Status read = ReadCursor(files.cursor_path_, &files.cursor_);
    if (!read.ok() && !absl::IsNotFound(read)) return read;
    std::error_code code;
    for (const std::string& path : {files.output_.path, files.errors_.path}) {
      if (read.ok() || !std::filesystem::exists(path, code)) continue;
      return absl::AlreadyExistsError(
          absl::StrCat(path, " is there already; --overwrite writes it anew"));
    }
  }
  RETURN_IF_ERROR(files.output_.OpenAt(files.cursor_.output_bytes));
  RETURN_IF_ERROR(files.errors_.OpenAt(files.cursor_.errors_bytes));
  // From now on they are this export's, and a second run may go on with them.
  RETURN_IF_ERROR(WriteCursor(files.cursor_path_, files.cursor_));
  return files;
}

ExportFiles::ExportFiles(ExportFiles&& other) noexcept
    : cursor_path_(std::move(other.cursor_path_)),
      cursor_(std::move(other.cursor_)),
      output_(std::exchange(other.output_, {})),
      errors_(std::exchange(other.errors_, {})) {}

ExportFiles::~ExportFiles() {
  if (output_.fd >= 0) close(output_.fd);
  if (errors_.fd >= 0) close(errors_.fd);
}

absl::Status ExportFiles::Append(std::string_view output, std::string_view errors,
                                 const std::string& cursor) {
  RETURN_IF_ERROR(output_.Append(output, &cursor_.output_bytes));
  RETURN_IF_ERROR(errors_.Append(errors, &cursor_.errors_bytes));
  cursor_.cursor = cursor;
  return WriteCursor(cursor_path_, cursor_);
}

void ExportFiles::Finish() {
  std::error_code code;
  std::filesystem::remove(cursor_path_, code);
}

}  // namespace latentd
