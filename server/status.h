#ifndef LATENTD_SERVER_STATUS_H_
#define LATENTD_SERVER_STATUS_H_

#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "grpcpp/support/status.h"

// The one place where absl::Status and grpc::Status meet. An absl::Status carries google.rpc
// details as payloads under their type URLs; the conversions keep them.

namespace latentd {

inline constexpr absl::string_view kErrorDomain = "latentd";

using ErrorMetadata = std::vector<std::pair<std::string, std::string>>;

struct FieldViolation {
  std::string field;        // path in the request, such as sampling.top_p or messages[2].role
  std::string description;  // "is 1.5; must be in (0, 1]"
};

// An error with its google.rpc.ErrorInfo. `reason` is UPPER_SNAKE_CASE; `metadata` holds each
// variable of the message.
absl::Status MakeError(absl::StatusCode code, absl::string_view reason, absl::string_view message,
                       const ErrorMetadata& metadata = {});

// Names the offending fields in a google.rpc.BadRequest.
absl::Status WithFieldViolations(absl::Status status,
                                 const std::vector<FieldViolation>& violations);

// INVALID_ARGUMENT, reason INVALID_FIELD, with every violation in a google.rpc.BadRequest.
// REQUIRES: not empty.
absl::Status MakeBadRequest(const std::vector<FieldViolation>& violations);

// Tells the client when to try again (google.rpc.RetryInfo).
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);

// The ErrorInfo's reason; the name of the code when there is no ErrorInfo; empty when OK.
std::string ErrorReason(const absl::Status& status);

// With exactly one ErrorInfo (reason: the code's name, where the status had none), and a RetryInfo
// when the code is UNAVAILABLE or RESOURCE_EXHAUSTED.
grpc::Status ToGrpcStatus(const absl::Status& status);

// The reverse, for clients: details that are google.rpc.Status become payloads again.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace latentd

#endif  // LATENTD_SERVER_STATUS_H_
