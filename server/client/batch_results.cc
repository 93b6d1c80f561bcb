#include "server/client/batch_results.h"

#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/client/batch_files.h"
#include "server/client/batch_progress.h"
#include "server/client/batch_watch.h"
#include "server/client/openai_batch.h"

namespace latentd {
namespace {

// The exit code of a command that got this far.
int Report(BatchClient& client, const grpc::Status& status, const BatchTerminal& terminal) {
  if (client.interrupts().pending()) return kExitInterrupted;
  if (status.ok()) return kExitOk;
  terminal.err << "error: " << DescribeError(status) << std::endl;
  return kExitFailed;
}

int Refuse(const absl::Status& status, const BatchTerminal& terminal) {
  terminal.err << "error: " << status.message() << std::endl;
  return kExitUsage;
}

grpc::Status GetJob(BatchClient& client, const std::string& name, v1::Job* job) {
  v1::GetJobRequest request;
  request.set_name(name);
  v1::GetJobResponse response;
  const grpc::Status status = client.Call(&v1::BatchService::Stub::GetJob, request, &response);
  if (status.ok()) *job = std::move(*response.mutable_job());
  return status;
}

absl::Status ReadStates(const std::vector<std::string>& names, v1::StreamResultsRequest* request) {
  for (const std::string& name : names) {
    const auto state = ParseItemState(name);
    if (!state) {
      return absl::InvalidArgumentError(absl::StrCat(
          "--state is '", name, "'; known are: succeeded, failed, cancelled, expired"));
    }
    request->add_states(*state);
  }
  return absl::OkStatus();
}

// One call, from the request's cursor, which moves on with what it takes.
grpc::Status StreamOnce(BatchClient& client, v1::StreamResultsRequest* request,
                        const std::function<absl::Status(const v1::StreamResultsResponse&)>& take) {
  grpc::ClientContext context;
  client.Prepare(&context);
  const OnInterrupt cancel(client.interrupts(), [&context] { context.TryCancel(); });
  const auto reader = client.stub().StreamResults(&context, *request);
  const absl::Time start = absl::Now();
  v1::StreamResultsResponse response;
  absl::Status taken;
  while (taken.ok() && reader->Read(&response)) {
    client.Progressed();
    taken = take(response);
    request->set_cursor(response.cursor());
  }
  if (!taken.ok()) context.TryCancel();
  client.StreamEnded(start);
  const grpc::Status status = reader->Finish();
  if (taken.ok()) return status;
  return {grpc::StatusCode::DATA_LOSS, std::string(taken.message())};
}

}  // namespace

grpc::Status StreamResults(
    BatchClient& client, v1::StreamResultsRequest request,
    const std::function<absl::Status(const v1::StreamResultsResponse&)>& take) {
  while (true) {
    const grpc::Status status = StreamOnce(client, &request, take);
    if (status.ok() || !client.TryAgain(status)) return status;
  }
}

int PrintResults(BatchClient& client, const ResultsOptions& options,
                 const BatchTerminal& terminal) {
  v1::StreamResultsRequest request;
  request.set_name(options.job);
  request.set_follow(options.follow);
  if (absl::Status known = ReadStates(options.states, &request); !known.ok()) {
    return Refuse(known, terminal);
  }
  ResultsCursor cursor;
  cursor.job = options.job;
  if (!options.cursor_file.empty()) {
    const absl::Status read = ReadCursor(options.cursor_file, &cursor);
    if (!read.ok() && !absl::IsNotFound(read)) return Refuse(read, terminal);
    request.set_cursor(cursor.cursor);
  }
  v1::Job job;
  if (grpc::Status status = GetJob(client, options.job, &job); !status.ok()) {
    return Report(client, status, terminal);
  }
  const grpc::Status status =
      StreamResults(client, request, [&](const v1::StreamResultsResponse& response) {
        for (const v1::ItemResult& result : response.results()) {
          terminal.out << (options.openai ? OpenAiResult(job, result) : JsonLine(result)) << '\n';
        }
        // First the lines, then that they are out: what is cut off here comes again.
        if (!terminal.out.flush()) return absl::DataLossError("cannot write the results");
        cursor.cursor = response.cursor();
        return options.cursor_file.empty() ? absl::OkStatus()
                                           : WriteCursor(options.cursor_file, cursor);
      });
  return Report(client, status, terminal);
}

int ExportResults(BatchClient& client, const ExportOptions& options,
                  const BatchTerminal& terminal) {
  absl::StatusOr<ExportFiles> files =
      ExportFiles::Open(options.prefix, options.job, options.overwrite);
  if (!files.ok()) return Refuse(files.status(), terminal);
  v1::Job job;
  grpc::Status status = GetJob(client, options.job, &job);
  const bool had_ended = status.ok() && HasEnded(job.state());
  if (status.ok()) {
    v1::StreamResultsRequest request;
    request.set_name(options.job);
    request.set_follow(options.follow);
    request.set_cursor(files->cursor());
    status = StreamResults(client, request, [&](const v1::StreamResultsResponse& response) {
      std::string output, errors;
      for (const v1::ItemResult& result : response.results()) {
        absl::StrAppend(IsOpenAiOutput(result) ? &output : &errors, OpenAiResult(job, result),
                        "\n");
      }
      return files->Append(output, errors, response.cursor());
    });
  }
  // Followed to its end it has ended; all that it is going to have is there.
  if (status.ok() && options.follow && !had_ended) status = GetJob(client, options.job, &job);
  if (!status.ok()) return Report(client, status, terminal);
  terminal.err << files->output_path() << ", " << files->errors_path() << std::endl;
  if (!had_ended && !options.follow) {
    terminal.err << options.job << " is " << StateName(job.state())
                 << ": the same command goes on with these files" << std::endl;
    return kExitOk;
  }
  files->Finish();
  return ExitCodeOf(job);
}

}  // namespace latentd
