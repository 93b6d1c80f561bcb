#include "server/status.h"

#include <algorithm>
#include <string>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "google/rpc/error_details.pb.h"
#include "google/rpc/status.pb.h"

namespace latentd {
namespace {

constexpr absl::string_view kTypePrefix = "type.googleapis.com/";
// After this long a client may hope for a slot, or for another replica behind its load balancer.
constexpr absl::Duration kDefaultRetryDelay = absl::Seconds(1);
// A status travels in HTTP/2 trailers, of which clients accept 8 KiB by default, in base64. What a
// request said may be much longer.
constexpr size_t kMaxMessageBytes = 512;
constexpr size_t kMaxMetadataValueBytes = 192;
constexpr size_t kMaxFieldBytes = 96;
constexpr size_t kMaxDescriptionBytes = 128;
constexpr int kMaxViolations = 100;
constexpr size_t kMaxViolationsBytes = 2800;  // of all of them

// At most `max_bytes`, cut between two characters.
std::string Cut(absl::string_view text, size_t max_bytes) {
  if (text.size() <= max_bytes) return std::string(text);
  size_t end = max_bytes - 3;
  while (end > 0 && (text[end] & 0xC0) == 0x80) --end;
  return absl::StrCat(text.substr(0, end), "...");
}

template <typename Detail>
std::string TypeUrl() {
  return absl::StrCat(kTypePrefix, Detail::descriptor()->full_name());
}

template <typename Detail>
void AddDetail(const Detail& detail, absl::Status* status) {
  status->SetPayload(TypeUrl<Detail>(), absl::Cord(detail.SerializeAsString()));
}

template <typename Detail>
bool HasDetail(const absl::Status& status) {
  return status.GetPayload(TypeUrl<Detail>()).has_value();
}

google::rpc::ErrorInfo MakeErrorInfo(absl::string_view reason, const ErrorMetadata& metadata) {
  google::rpc::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain(std::string(kErrorDomain));
  for (const auto& [key, value] : metadata) {
    (*info.mutable_metadata())[key] = Cut(value, kMaxMetadataValueBytes);
  }
  return info;
}

}  // namespace

absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       const ErrorMetadata& metadata) {
  absl::Status status(code, Cut(message, kMaxMessageBytes));
  AddDetail(MakeErrorInfo(reason, metadata), &status);
  return status;
}

absl::Status WithFieldViolations(absl::Status status,
                                 const std::vector<FieldViolation>& violations) {
  google::rpc::BadRequest bad_request;
  for (const FieldViolation& violation : violations) {
    auto* detail = bad_request.add_field_violations();
    detail->set_field(Cut(violation.field, kMaxFieldBytes));
    detail->set_description(Cut(violation.description, kMaxDescriptionBytes));
    if (bad_request.field_violations_size() > kMaxViolations ||
        bad_request.ByteSizeLong() > kMaxViolationsBytes) {
      bad_request.mutable_field_violations()->RemoveLast();
      break;
    }
  }
  AddDetail(bad_request, &status);
  return status;
}

absl::Status MakeBadRequest(const std::vector<FieldViolation>& violations) {
  LATENTD_CHECK(!violations.empty());
  std::string message, fields;
  for (const FieldViolation& violation : violations) {
    absl::StrAppend(&message, message.empty() ? "" : "; ", violation.field, " ",
                    violation.description);
    absl::StrAppend(&fields, fields.empty() ? "" : ",", violation.field);
  }
  return WithFieldViolations(
      MakeError(absl::StatusCode::kInvalidArgument, "INVALID_FIELD", message, {{"fields", fields}}),
      violations);
}

absl::Status WithRetryDelay(absl::Status status, absl::Duration delay) {
  google::rpc::RetryInfo info;
  const int64_t seconds = absl::IDivDuration(delay, absl::Seconds(1), &delay);
  info.mutable_retry_delay()->set_seconds(seconds);
  info.mutable_retry_delay()->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(delay)));
  AddDetail(info, &status);
  return status;
}

std::string ErrorReason(const absl::Status& status) {
  if (status.ok()) return "";
  if (const auto payload = status.GetPayload(TypeUrl<google::rpc::ErrorInfo>())) {
    google::rpc::ErrorInfo info;
    if (info.ParseFromString(std::string(*payload))) return info.reason();
  }
  return absl::StatusCodeToString(status.code());
}

grpc::Status ToGrpcStatus(const absl::Status& status) {
  if (status.ok()) return grpc::Status::OK;
  absl::Status full = status;
  if (!HasDetail<google::rpc::ErrorInfo>(full)) {
    AddDetail(MakeErrorInfo(ErrorReason(full), {}), &full);
  }
  if ((absl::IsUnavailable(full) || absl::IsResourceExhausted(full)) &&
      !HasDetail<google::rpc::RetryInfo>(full)) {
    full = WithRetryDelay(std::move(full), kDefaultRetryDelay);
  }
  google::rpc::Status proto;
  proto.set_code(static_cast<int>(full.code()));
  const std::string message = Cut(full.message(), kMaxMessageBytes);
  proto.set_message(message);
  full.ForEachPayload([&proto](absl::string_view type_url, const absl::Cord& value) {
    auto* any = proto.add_details();
    any->set_type_url(std::string(type_url));
    any->set_value(std::string(value));
  });
  // Payloads have no order of their own; a client that prints them shall see the same text each
  // time.
  std::sort(proto.mutable_details()->begin(), proto.mutable_details()->end(),
            [](const auto& a, const auto& b) { return a.type_url() < b.type_url(); });
  return grpc::Status(static_cast<grpc::StatusCode>(full.code()), message,
                      proto.SerializeAsString());
}

absl::Status FromGrpcStatus(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
  google::rpc::Status proto;
  if (proto.ParseFromString(status.error_details())) {
    for (const auto& any : proto.details()) {
      result.SetPayload(any.type_url(), absl::Cord(any.value()));
    }
  }
  return result;
}

}  // namespace latentd
