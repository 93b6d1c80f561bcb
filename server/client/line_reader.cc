#include "server/client/line_reader.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

// Appends what one read(2) gives to `*buffer`: the number of bytes, 0 at the end of the file.
absl::StatusOr<size_t> ReadSome(int fd, const Interrupts& interrupts, std::string* buffer) {
  while (true) {
    pollfd poll_fds[] = {{.fd = interrupts.fd(), .events = POLLIN, .revents = 0},
                         {.fd = fd, .events = POLLIN, .revents = 0}};
    if (poll(poll_fds, 2, -1) < 0) {
      if (errno == EINTR) continue;
      return absl::InternalError(absl::StrCat("cannot wait for input: ", std::strerror(errno)));
    }
    if (poll_fds[0].revents != 0) return absl::CancelledError("interrupted");
    if (poll_fds[1].revents == 0) continue;
    char bytes[16384];
    const ssize_t size = read(fd, bytes, sizeof(bytes));
    if (size < 0) {
      if (errno == EINTR || errno == EAGAIN) continue;
      return absl::DataLossError(absl::StrCat("cannot read input: ", std::strerror(errno)));
    }
    buffer->append(bytes, size);
    return size;
  }
}

}  // namespace

LineReader::Event LineReader::Read(std::string* line) {
  size_t searched = 0;
  while (true) {
    if (const size_t end = buffer_.find('\n', searched); end != std::string::npos) {
      line->assign(buffer_, 0, end);
      buffer_.erase(0, end + 1);
      if (line->ends_with('\r')) line->pop_back();
      return Event::kLine;
    }
    searched = buffer_.size();
    if (at_end_) {
      if (buffer_.empty()) return Event::kEnd;
      line->swap(buffer_);
      buffer_.clear();
      return Event::kLine;
    }
    const absl::StatusOr<size_t> size = ReadSome(fd_, interrupts_, &buffer_);
    if (absl::IsCancelled(size.status())) {
      buffer_.clear();
      return Event::kInterrupted;
    }
    at_end_ = !size.ok() || *size == 0;
  }
}

absl::StatusOr<std::string> ReadAll(int fd, size_t max_bytes, const Interrupts& interrupts) {
  std::string text;
  while (true) {
    ASSIGN_OR_RETURN(const size_t size, ReadSome(fd, interrupts, &text));
    if (size == 0) return text;
    if (text.size() > max_bytes) {
      return absl::InvalidArgumentError(
          absl::StrCat("standard input has more than ", max_bytes, " bytes"));
    }
  }
}

absl::Status CopyAll(int fd, std::FILE* file, const Interrupts& interrupts) {
  std::string bytes;
  while (true) {
    bytes.clear();
    ASSIGN_OR_RETURN(const size_t size, ReadSome(fd, interrupts, &bytes));
    const bool at_end = size == 0;
    const bool written =
        std::fwrite(bytes.data(), 1, size, file) == size && (!at_end || std::fflush(file) == 0);
    if (!written) {
      return absl::DataLossError(absl::StrCat("cannot keep the input: ", std::strerror(errno)));
    }
    if (at_end) return absl::OkStatus();
  }
}

}  // namespace latentd
