#ifndef LATENTD_SERVER_CLIENT_BATCH_INPUT_H_
#define LATENTD_SERVER_CLIENT_BATCH_INPUT_H_

#include <cstdint>
#include <cstdio>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "server/client/interrupts.h"

namespace latentd {

// The items of a job in a file, one JSON object a line: OpenAI's batch format, or BatchItem in
// protobuf's JSON form. Empty lines count as lines alone. Holds one line at a time, however long
// the file is.
class BatchInput {
 public:
  struct Options {
    std::string path;          // "-": standard input, which is kept in a temporary file
    bool openai_only = false;  // lines in the other form are wrong
    int max_errors = 100;      // so many are told
  };

  // NOT_FOUND when it cannot be opened, CANCELLED on Ctrl-C while standard input is read.
  static absl::StatusOr<std::unique_ptr<BatchInput>> Open(Options options, int in_fd,
                                                          const Interrupts& interrupts);

  struct Summary {
    int64_t num_items = 0;
    int64_t num_bytes = 0;  // of all serialized items
    std::string chain;      // of the items, as ItemChain says
    // What is wrong, "FILE:LINE: what" each. Empty: nothing.
    std::vector<std::string> errors;
  };
  // Reads the whole file and checks every line, and that no custom_id is there twice; keeps 24
  // bytes an item meanwhile. DATA_LOSS when the file cannot be read, CANCELLED on Ctrl-C.
  absl::StatusOr<Summary> Check(const Interrupts& interrupts);

  // To the first item again.
  void Rewind();
  // The next item, serialized the same way every time; nullopt: the end. REQUIRES: Check() found
  // nothing. ABORTED when a line is wrong now: the file was changed.
  absl::StatusOr<std::optional<std::string>> Next();

  // "FILE:LINE" of each of these items; reads the file again.
  std::vector<std::string> PlacesOf(const std::set<int64_t>& items);

 private:
  using File = std::unique_ptr<std::FILE, int (*)(std::FILE*)>;

  BatchInput(Options options, File file) : options_(std::move(options)), file_(std::move(file)) {}

  // The next line that is not empty; nullopt: the end.
  absl::StatusOr<std::optional<std::string>> NextLine();
  // Makes an item of a line and appends what is wrong with it.
  std::string ReadItem(const std::string& line, std::string* custom_id,
                       std::vector<std::string>* errors) const;
  std::string Place() const;

  const Options options_;
  const File file_;
  int64_t line_ = 0;    // number of the line that was read last, from 1
  std::string buffer_;  // read, not yet returned
  size_t begin_ = 0;    // of what is left in it
};

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_INPUT_H_
