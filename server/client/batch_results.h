#ifndef LATENTD_SERVER_CLIENT_BATCH_RESULTS_H_
#define LATENTD_SERVER_CLIENT_BATCH_RESULTS_H_

#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "latentd/v1/batch.pb.h"
#include "server/client/batch_client.h"

namespace latentd {

// Reads a job's results from the request's cursor on, over the server's own ends and starts.
// `take` gets each response once, in order; its error ends the reading and is returned as
// DATA_LOSS.
grpc::Status StreamResults(
    BatchClient& client, v1::StreamResultsRequest request,
    const std::function<absl::Status(const v1::StreamResultsResponse&)>& take);

// `latentd batch results`.
struct ResultsOptions {
  std::string job;
  std::string cursor_file;          // begins after the cursor in it, and keeps it up to date
  std::vector<std::string> states;  // names of item states; empty: all
  bool follow = false;
  bool openai = false;
};
int PrintResults(BatchClient& client, const ResultsOptions& options, const BatchTerminal& terminal);

// `latentd batch export`.
struct ExportOptions {
  std::string job;
  // PREFIX.output.jsonl and PREFIX.errors.jsonl are written; PREFIX.cursor says how far they are,
  // until the job has ended and all is written. A .jsonl at its end is left out.
  std::string prefix;
  bool follow = false;
  bool overwrite = false;  // begin anew, whatever is there
};
int ExportResults(BatchClient& client, const ExportOptions& options, const BatchTerminal& terminal);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_BATCH_RESULTS_H_
