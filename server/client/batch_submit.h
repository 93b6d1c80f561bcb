#ifndef LATENTD_SERVER_CLIENT_BATCH_SUBMIT_H_
#define LATENTD_SERVER_CLIENT_BATCH_SUBMIT_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/client/batch_client.h"

namespace latentd {

// `latentd batch submit` and `import`.
struct SubmitOptions {
  std::string file;  // "-": standard input
  bool openai_only = false;
  int max_errors = 100;
  std::string request_id;  // empty: made of the job's spec and items
  std::string model;
  std::string completion_window;  // as ParseLongDuration; empty: the server's default
  std::string result_ttl;         // the same
  int32_t priority = 0;
  std::optional<int32_t> max_attempts;
  bool fail_fast = false;
  std::vector<std::string> metadata;  // KEY=VALUE
  bool watch = false;                 // to the job's end
  bool json = false;                  // the job rather than its name
};

// Checks the file, uploads it, and prints the job's name. What is wrong with the file is told
// before anything is sent, what the server finds wrong with its lines too. Returns the exit code.
int SubmitJob(BatchClient& client, const SubmitOptions& options, const BatchTerminal& terminal);

// "90s", "1h30m", and beside what absl has "7d".
absl::StatusOr<absl::Duration> ParseLongDuration(const std::string& option,
                                                 const std::string& text);

// KEY=VALUE pairs into a map; `option` is for the error.
absl::Status ReadMetadata(const std::string& option, const std::vector<std::string>& pairs,
                          google::protobuf::Map<std::string, std::string>* metadata);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_SUBMIT_H_
