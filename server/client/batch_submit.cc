#include "server/client/batch_submit.h"

#include <algorithm>
#include <map>
#include <memory>
#include <ostream>
#include <set>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"
#include "server/client/batch_input.h"
#include "server/client/batch_progress.h"
#include "server/client/batch_upload.h"
#include "server/client/batch_watch.h"

namespace latentd {
namespace {

int Refuse(const absl::Status& status, const BatchTerminal& terminal) {
  terminal.err << "error: " << status.message() << std::endl;
  return absl::IsInvalidArgument(status) || absl::IsNotFound(status) ? kExitUsage : kExitFailed;
}

absl::Status SetDuration(const std::string& option, const std::string& text,
                         google::protobuf::Duration* duration) {
  ASSIGN_OR_RETURN(const absl::Duration value, ParseLongDuration(option, text));
  duration->set_seconds(absl::ToInt64Seconds(value));
  duration->set_nanos(
      static_cast<int32_t>(absl::ToInt64Nanoseconds(value - absl::Seconds(duration->seconds()))));
  return absl::OkStatus();
}

absl::StatusOr<v1::JobSpec> MakeSpec(const SubmitOptions& options) {
  v1::JobSpec spec;
  spec.set_model(options.model);
  spec.set_priority(options.priority);
  if (options.max_attempts) spec.set_max_attempts_per_item(*options.max_attempts);
  spec.set_fail_fast(options.fail_fast);
  if (!options.completion_window.empty()) {
    RETURN_IF_ERROR(SetDuration("--completion-window", options.completion_window,
                                spec.mutable_completion_window()));
  }
  if (!options.result_ttl.empty()) {
    RETURN_IF_ERROR(SetDuration("--result-ttl", options.result_ttl, spec.mutable_result_ttl()));
  }
  RETURN_IF_ERROR(ReadMetadata("--metadata", options.metadata, spec.mutable_metadata()));
  return spec;
}

// 17 of "items[17].chat.sampling.top_p", and the rest of it.
std::optional<std::pair<int64_t, std::string>> ItemOf(const std::string& field) {
  const std::string prefix = "items[";
  const size_t end = field.find(']');
  int64_t index = 0;
  if (!field.starts_with(prefix) || end == std::string::npos ||
      !absl::SimpleAtoi(field.substr(prefix.size(), end - prefix.size()), &index) || index < 0) {
    return std::nullopt;
  }
  return std::pair(index, field.substr(std::min(end + 2, field.size())));
}

// The server's refusal, by lines of the file. False: it is not of the items.
bool ReportRefusedItems(const grpc::Status& status, BatchInput& input, std::ostream& err) {
  if (status.error_code() != grpc::StatusCode::INVALID_ARGUMENT) return false;
  std::vector<std::pair<int64_t, std::string>> refused;
  std::set<int64_t> items;
  for (const auto& [field, description] : FieldViolations(status)) {
    const auto item = ItemOf(field);
    if (!item) return false;
    items.insert(item->first);
    refused.emplace_back(item->first, absl::StrCat(item->second, ": ", description));
  }
  if (refused.empty()) return false;
  const std::vector<std::string> places = input.PlacesOf(items);
  if (places.size() != items.size()) return false;
  std::map<int64_t, std::string> place_of;
  for (auto [it, i] = std::pair(items.begin(), size_t{0}); it != items.end(); ++it, ++i) {
    place_of[*it] = places[i];
  }
  std::stable_sort(refused.begin(), refused.end(),
                   [](const auto& a, const auto& b) { return a.first < b.first; });
  for (const auto& [index, what] : refused) err << place_of[index] << ": " << what << '\n';
  return true;
}

}  // namespace

int SubmitJob(BatchClient& client, const SubmitOptions& options, const BatchTerminal& terminal) {
  UploadPlan plan;
  absl::StatusOr<v1::JobSpec> spec = MakeSpec(options);
  if (!spec.ok()) return Refuse(spec.status(), terminal);
  plan.spec = *std::move(spec);
  auto input = BatchInput::Open(
      {.path = options.file, .openai_only = options.openai_only, .max_errors = options.max_errors},
      terminal.in_fd, client.interrupts());
  if (absl::IsCancelled(input.status())) return kExitInterrupted;
  if (!input.ok()) return Refuse(input.status(), terminal);
  absl::StatusOr<BatchInput::Summary> summary = (*input)->Check(client.interrupts());
  if (absl::IsCancelled(summary.status())) return kExitInterrupted;
  if (!summary.ok()) return Refuse(summary.status(), terminal);
  if (!summary->errors.empty()) {
    for (const std::string& error : summary->errors) terminal.err << error << '\n';
    terminal.err << "error: " << options.file << " is not sent" << std::endl;
    return kExitUsage;
  }
  plan.summary = *std::move(summary);
  plan.request_id =
      options.request_id.empty() ? MakeRequestId(plan.spec, plan.summary) : options.request_id;

  ProgressBar bar(terminal.err_is_terminal, terminal.err);
  client.set_on_retry([&bar] { bar.End(); });
  const auto on_progress = [&](int64_t num_sent) {
    // A file that is sent at once needs no word on it where every line stays.
    if (terminal.err_is_terminal || (num_sent > 0 && num_sent < plan.summary.num_items)) {
      bar.Show("uploading", num_sent, plan.summary.num_items, "", absl::Now());
    }
  };
  v1::CreateJobResponse response;
  const grpc::Status status = UploadJob(client, plan, **input, on_progress, &response);
  bar.End();
  client.set_on_retry([] {});
  if (client.interrupts().pending() && !status.ok()) {
    terminal.err << "interrupted; the same command goes on with the upload" << std::endl;
    return kExitInterrupted;
  }
  if (!status.ok()) {
    const bool of_items = ReportRefusedItems(status, **input, terminal.err);
    terminal.err << "error: "
                 << (of_items ? options.file + " was refused; nothing of it is kept"
                              : DescribeError(status))
                 << std::endl;
    return of_items ? kExitUsage : kExitFailed;
  }
  const v1::Job& job = response.job();
  if (response.already_existed()) {
    terminal.err << job.name() << " is there already: " << StateName(job.state()) << std::endl;
  }
  terminal.out << (options.json ? JsonLine(job) : job.name()) << std::endl;
  return options.watch ? WatchJob(client, job.name(), options.json, terminal) : kExitOk;
}

absl::StatusOr<absl::Duration> ParseLongDuration(const std::string& option,
                                                 const std::string& text) {
  absl::Duration duration;
  double days = 0;
  if (text.ends_with('d') && absl::SimpleAtod(text.substr(0, text.size() - 1), &days)) {
    duration = absl::Hours(24) * days;
  } else if (!absl::ParseDuration(text, &duration)) {
    duration = absl::InfiniteDuration();
  }
  if (duration > absl::ZeroDuration() && duration < absl::Hours(24) * 100'000) return duration;
  return absl::InvalidArgumentError(
      absl::StrCat(option, " is '", text, "'; it must be a time such as 90s, 12h or 7d"));
}

absl::Status ReadMetadata(const std::string& option, const std::vector<std::string>& pairs,
                          google::protobuf::Map<std::string, std::string>* metadata) {
  for (const std::string& pair : pairs) {
    const size_t equals = pair.find('=');
    if (equals == std::string::npos || equals == 0) {
      return absl::InvalidArgumentError(
          absl::StrCat(option, " is '", pair, "'; it must be KEY=VALUE"));
    }
    (*metadata)[pair.substr(0, equals)] = pair.substr(equals + 1);
  }
  return absl::OkStatus();
}

}  // namespace latentd
