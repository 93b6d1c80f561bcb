#include "server/batch/run_end.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "server/status.h"

namespace latentd {

RunEnd JudgeRun(const absl::Status& error) {
  switch (error.code()) {
    case absl::StatusCode::kUnavailable: {
      // All others say that nothing was run: LOADING, DRAINING, STOPPED, ENGINE_UNAVAILABLE. Of an
      // engine that is lost what ran in it may be the reason, as of a server that crashes.
      const std::string reason = ErrorReason(error);
      return reason == "ENGINE_FAILED" || reason == "ENGINE_LOST" ? RunEnd::kBad
                                                                  : RunEnd::kPostponed;
    }
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kCancelled:
      return RunEnd::kPostponed;
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kInternal:
    case absl::StatusCode::kUnknown:
      return RunEnd::kBad;
    default:
      return RunEnd::kFailed;
  }
}

v1::ItemError ToItemError(const absl::Status& error) {
  v1::ItemError item_error;
  item_error.set_code(static_cast<int32_t>(error.code()));
  item_error.set_reason(ErrorReason(error));
  item_error.set_message(std::string(error.message()));
  return item_error;
}

v1::ItemError AttemptsExhausted(int32_t attempts, const absl::Status& error) {
  v1::ItemError item_error;
  const absl::StatusCode code = error.ok() ? absl::StatusCode::kInternal : error.code();
  item_error.set_code(static_cast<int32_t>(code));
  item_error.set_reason("ATTEMPTS_EXHAUSTED");
  item_error.set_message(
      absl::StrCat("begun ", attempts, " times, each time in vain; the last time: ",
                   error.ok() ? "the server ended while it ran" : std::string(error.message())));
  return item_error;
}

}  // namespace latentd
