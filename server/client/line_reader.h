#ifndef LATENTD_SERVER_CLIENT_LINE_READER_H_
#define LATENTD_SERVER_CLIENT_LINE_READER_H_

#include <cstdio>
#include <string>

#include "absl/status/statusor.h"
#include "server/client/interrupts.h"

namespace latentd {

// Reads lines from a file descriptor, and notices Ctrl-C while it waits for one.
class LineReader {
 public:
  enum class Event { kLine, kEnd, kInterrupted };

  // Both must outlive the reader; it does not own `fd`.
  LineReader(int fd, const Interrupts& interrupts) : fd_(fd), interrupts_(interrupts) {}

  // Waits for a line and puts it, without its end, into `*line`. A last line without an end counts
  // as one. kInterrupted drops what was read of a line; the caller clears the interrupt. A read
  // error is kEnd.
  Event Read(std::string* line);

 private:
  int fd_;
  const Interrupts& interrupts_;
  std::string buffer_;  // read, not yet returned
  bool at_end_ = false;
};

// All of `fd` to its end. Refuses more than `max_bytes`; CANCELLED on Ctrl-C.
absl::StatusOr<std::string> ReadAll(int fd, size_t max_bytes, const Interrupts& interrupts);

// All of `fd` into `file`; CANCELLED on Ctrl-C, DATA_LOSS when it cannot be read or written.
absl::Status CopyAll(int fd, std::FILE* file, const Interrupts& interrupts);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_LINE_READER_H_
