#include "server/client/batch_jobs.h"

#include <algorithm>
#include <ostream>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "server/client/batch_progress.h"
#include "server/client/batch_submit.h"
#include "server/client/batch_watch.h"

namespace latentd {
namespace {

using Stub = v1::BatchService::Stub;

int Fail(BatchClient& client, const grpc::Status& status, const BatchTerminal& terminal) {
  if (client.interrupts().pending()) return kExitInterrupted;
  terminal.err << "error: " << DescribeError(status) << std::endl;
  return kExitFailed;
}

int Refuse(const std::string& message, const BatchTerminal& terminal) {
  terminal.err << "error: " << message << std::endl;
  return kExitUsage;
}

std::string TimeText(const google::protobuf::Timestamp& time) {
  return absl::FormatTime("%Y-%m-%d %H:%M:%S", absl::FromUnixSeconds(time.seconds()),
                          absl::LocalTimeZone());
}

void PrintJob(const v1::Job& job, std::ostream& out) {
  const v1::JobCounts& counts = job.counts();
  out << job.name() << '\n';
  const auto line = [&out](absl::string_view name, const std::string& value) {
    if (!value.empty()) out << absl::StrFormat("  %-12s %s\n", name, value);
  };
  const auto time = [&line](absl::string_view name, bool is_set,
                            const google::protobuf::Timestamp& value) {
    if (is_set) line(name, TimeText(value));
  };
  line("state", absl::StrCat(StateName(job.state()), job.state_reason().empty() ? "" : ": ",
                             job.state_reason()));
  line("items",
       absl::StrCat(counts.total(), ": ", counts.succeeded(), " succeeded, ", counts.failed(),
                    " failed, ", counts.running(), " running, ", counts.pending(), " pending, ",
                    counts.cancelled(), " cancelled, ", counts.expired(), " expired"));
  line("tokens",
       absl::StrCat(job.prompt_tokens(), " prompt, ", job.completion_tokens(), " completion"));
  line("model", job.spec().model());
  line("priority", absl::StrCat(job.spec().priority()));
  if (job.recoveries() > 0) line("recoveries", absl::StrCat(job.recoveries()));
  line("retry of", job.retry_of());
  for (const auto& [key, value] : job.spec().metadata())
    line("metadata", absl::StrCat(key, "=", value));
  time("created", job.has_create_time(), job.create_time());
  time("started", job.has_start_time(), job.start_time());
  time("ended", job.has_end_time(), job.end_time());
  if (!job.has_end_time()) time("expires", job.has_expire_time(), job.expire_time());
  time("deleted", job.has_purge_time(), job.purge_time());
  line("request id", job.request_id());
  line("etag", job.etag());
}

void PrintRow(const v1::Job& job, std::ostream& out) {
  const v1::JobCounts& counts = job.counts();
  out << absl::StrFormat("%-37s  %-11s  %10d  %10d  %8d  %s\n", job.name(), StateName(job.state()),
                         counts.total(), NumEnded(counts), counts.failed(),
                         TimeText(job.create_time()));
}

}  // namespace

std::string FullJobName(const std::string& name) {
  return name.find('/') == std::string::npos ? absl::StrCat("jobs/", name) : name;
}

int ShowJobs(BatchClient& client, const JobsOptions& options, const BatchTerminal& terminal) {
  for (const std::string& name : options.jobs) {
    v1::GetJobRequest request;
    request.set_name(name);
    v1::GetJobResponse response;
    const grpc::Status status = client.Call(&Stub::GetJob, request, &response);
    if (!status.ok()) return Fail(client, status, terminal);
    if (options.json) {
      terminal.out << JsonLine(response.job()) << std::endl;
    } else {
      PrintJob(response.job(), terminal.out);
    }
  }
  return kExitOk;
}

int CancelJobs(BatchClient& client, const JobsOptions& options, const BatchTerminal& terminal) {
  for (const std::string& name : options.jobs) {
    v1::CancelJobRequest request;
    request.set_name(name);
    v1::CancelJobResponse response;
    const grpc::Status status = client.Call(&Stub::CancelJob, request, &response);
    if (!status.ok()) return Fail(client, status, terminal);
    terminal.err << name << ": " << StateName(response.job().state()) << std::endl;
  }
  return kExitOk;
}

int DeleteJobs(BatchClient& client, const JobsOptions& options, const BatchTerminal& terminal) {
  if (!options.etag.empty() && options.jobs.size() > 1) {
    return Refuse("--etag is of one job", terminal);
  }
  for (const std::string& name : options.jobs) {
    v1::DeleteJobRequest request;
    request.set_name(name);
    request.set_etag(options.etag);
    v1::DeleteJobResponse response;
    const grpc::Status status = client.Call(&Stub::DeleteJob, request, &response);
    if (!status.ok()) return Fail(client, status, terminal);
  }
  return kExitOk;
}

int ListJobs(BatchClient& client, const ListOptions& options, const BatchTerminal& terminal) {
  v1::ListJobsRequest request;
  for (const std::string& name : options.states) {
    const auto state = ParseJobState(name);
    if (!state) return Refuse(absl::StrCat("--state is '", name, "'; that is none"), terminal);
    request.add_states(*state);
  }
  if (absl::Status read = ReadMetadata("--metadata", options.metadata, request.mutable_metadata());
      !read.ok()) {
    return Refuse(std::string(read.message()), terminal);
  }
  bool has_head = options.json;
  int left = options.limit;
  do {
    request.set_page_size(std::min(left, 1000));
    v1::ListJobsResponse response;
    const grpc::Status status = client.Call(&Stub::ListJobs, request, &response);
    if (!status.ok()) return Fail(client, status, terminal);
    for (const v1::Job& job : response.jobs()) {
      if (options.json) {
        terminal.out << JsonLine(job) << '\n';
        continue;
      }
      if (!std::exchange(has_head, true)) {
        terminal.out << absl::StrFormat("%-37s  %-11s  %10s  %10s  %8s  %s\n", "JOB", "STATE",
                                        "ITEMS", "ENDED", "FAILED", "CREATED");
      }
      PrintRow(job, terminal.out);
    }
    left -= response.jobs_size();
    request.set_page_token(response.next_page_token());
  } while (left > 0 && !request.page_token().empty());
  terminal.out << std::flush;
  return kExitOk;
}

int RetryJob(BatchClient& client, const RetryOptions& options, const BatchTerminal& terminal) {
  v1::RetryJobRequest request;
  request.set_name(options.job);
  request.set_request_id(options.request_id.empty()
                             ? absl::StrCat("retry-", absl::StripPrefix(options.job, "jobs/"))
                             : options.request_id);
  v1::RetryJobResponse response;
  const grpc::Status status = client.Call(&Stub::RetryJob, request, &response);
  if (!status.ok()) return Fail(client, status, terminal);
  const v1::Job& job = response.job();
  if (response.already_existed()) {
    terminal.err << job.name() << " is there already: " << StateName(job.state()) << std::endl;
  }
  terminal.out << (options.json ? JsonLine(job) : job.name()) << std::endl;
  return options.watch ? WatchJob(client, job.name(), options.json, terminal) : kExitOk;
}

}  // namespace latentd
