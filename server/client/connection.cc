#include "server/client/connection.h"

#include <algorithm>
#include <cmath>
#include <ostream>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "google/rpc/code.pb.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace latentd {
namespace {

constexpr double kDefaultWaitSeconds = 60;
// Between two tries, whatever the server's RetryInfo asks for.
constexpr absl::Duration kShortestRetry = absl::Milliseconds(100);
constexpr absl::Duration kLongestRetry = absl::Seconds(5);

// The first detail of type T in the status that the server attached, if any.
template <typename T>
std::optional<T> FindDetail(const grpc::Status& status) {
  google::rpc::Status details;
  if (!details.ParseFromString(status.error_details())) return std::nullopt;
  for (const google::protobuf::Any& any : details.details()) {
    T detail;
    if (any.Is<T>() && any.UnpackTo(&detail)) return detail;
  }
  return std::nullopt;
}

std::string OneLine(absl::string_view text) {
  return absl::StrReplaceAll(text, {{"\r\n", " "}, {"\n", " "}, {"\r", " "}, {"\x1b", "^["}});
}

}  // namespace

void AddConnectionOptions(CLI::App& app, ConnectionOptions* options) {
  app.add_option("--target", options->target, "Server: host:port, or unix:/path")
      ->capture_default_str();
  app.add_option("--wait", options->wait_s,
                 "Seconds to wait for a server that is loading (default 60; when given, also for "
                 "one that does not listen yet)");
}

absl::Status ValidateConnectionOptions(const ConnectionOptions& options) {
  if (options.target.empty()) return absl::InvalidArgumentError("--target is empty");
  const double wait_s = options.wait_s.value_or(0);
  if (!std::isfinite(wait_s) || wait_s < 0 || wait_s > 86400) {
    return absl::InvalidArgumentError(
        absl::StrCat("--wait is ", wait_s, "; it must lie in [0, 86400] seconds"));
  }
  return absl::OkStatus();
}

std::shared_ptr<grpc::Channel> MakeChannel(const ConnectionOptions& options) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // whoever measures or waits wants to see each try
  arguments.SetMaxReceiveMessageSize(-1);
  arguments.SetMaxSendMessageSize(-1);
  return grpc::CreateCustomChannel(options.target, grpc::InsecureChannelCredentials(), arguments);
}

std::string CodeName(grpc::StatusCode code) {
  return google::rpc::Code_IsValid(code)
             ? google::rpc::Code_Name(static_cast<google::rpc::Code>(code))
             : absl::StrCat("CODE_", static_cast<int>(code));
}

std::string DescribeError(const grpc::Status& status) {
  std::string text = CodeName(status.error_code());
  if (const auto info = FindDetail<google::rpc::ErrorInfo>(status);
      info && !info->reason().empty()) {
    absl::StrAppend(&text, " (", info->reason(), ")");
  }
  absl::StrAppend(&text, ": ", status.error_message());
  if (const auto bad = FindDetail<google::rpc::BadRequest>(status)) {
    std::vector<std::string> violations;
    for (const auto& violation : bad->field_violations()) {
      // The server may have put the only violation into the message.
      if (status.error_message().find(violation.description()) != std::string::npos &&
          status.error_message().find(violation.field()) != std::string::npos) {
        continue;
      }
      violations.push_back(absl::StrCat(violation.field(), ": ", violation.description()));
    }
    if (!violations.empty()) absl::StrAppend(&text, " (", absl::StrJoin(violations, "; "), ")");
  }
  if (const auto delay = RetryDelay(status)) {
    absl::StrAppend(&text, " (try again in ", absl::FormatDuration(*delay), ")");
  }
  return OneLine(text);
}

std::vector<std::pair<std::string, std::string>> FieldViolations(const grpc::Status& status) {
  std::vector<std::pair<std::string, std::string>> violations;
  if (const auto bad = FindDetail<google::rpc::BadRequest>(status)) {
    for (const auto& violation : bad->field_violations()) {
      violations.emplace_back(violation.field(), violation.description());
    }
  }
  return violations;
}

std::optional<absl::Duration> RetryDelay(const grpc::Status& status) {
  const auto info = FindDetail<google::rpc::RetryInfo>(status);
  if (!info) return std::nullopt;
  return absl::Seconds(info->retry_delay().seconds()) +
         absl::Nanoseconds(info->retry_delay().nanos());
}

ServerWait::ServerWait(const ConnectionOptions& options, grpc::Channel& channel,
                       const Interrupts& interrupts, std::ostream& err)
    : options_(options),
      channel_(channel),
      interrupts_(interrupts),
      err_(err),
      end_(absl::Now() + absl::Seconds(options.wait_s.value_or(kDefaultWaitSeconds))) {}

bool ServerWait::TryAgain(const grpc::Status& status) {
  if (status.error_code() != grpc::StatusCode::UNAVAILABLE || interrupts_.pending()) return false;
  const std::optional<absl::Duration> delay = RetryDelay(status);
  // Without RetryInfo nobody answered: worth a wait only where the user asked for one.
  if (!delay && !options_.wait_s) return false;
  const absl::Time now = absl::Now();
  if (now >= end_) return false;
  // gRPC's own words for a server that is not there change from try to try.
  const std::string notice =
      absl::StrCat("waiting for ", options_.target, ": ",
                   delay ? OneLine(status.error_message()) : "it does not answer yet");
  if (notice != last_notice_) err_ << notice << std::endl;
  last_notice_ = notice;
  if (!delay) return WaitForConnection();
  const absl::Duration pause = std::clamp(*delay, kShortestRetry, kLongestRetry);
  return !interrupts_.Sleep(std::min(pause, end_ - now));
}

// gRPC moves a connection forward only while somebody waits on the channel: with a sleep between
// the tries it would be found open 5 s late.
bool ServerWait::WaitForConnection() {
  while (!interrupts_.pending() && absl::Now() < end_) {
    const absl::Time next = std::min(end_, absl::Now() + kShortestRetry);
    if (channel_.WaitForConnected(absl::ToChronoTime(next))) return true;
  }
  return false;
}

}  // namespace latentd
