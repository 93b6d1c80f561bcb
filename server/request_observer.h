#ifndef LATENTD_SERVER_REQUEST_OBSERVER_H_
#define LATENTD_SERVER_REQUEST_OBSERVER_H_

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace latentd {

// How one generating call (Chat, StreamChat, Complete, StreamComplete) went, told once, at its end.
struct RequestRecord {
  std::string_view method;  // "StreamChat"; static storage
  std::string request_id;
  std::map<std::string, std::string> metadata;  // Serving.metadata
  absl::StatusCode code = absl::StatusCode::kOk;
  std::string reason;              // ErrorInfo.reason of the error; empty when code is OK
  std::string_view finish_reason;  // "stop", "length", or "" when the answer did not end by itself
  int32_t prompt_tokens = 0;       // 0 when it was refused before it was encoded
  int32_t cached_tokens = 0;
  int32_t completion_tokens = 0;
  int32_t reasoning_tokens = 0;
  absl::Duration total;                 // from arrival to the end
  std::optional<absl::Duration> queue;  // from arrival to the first step; unset: it never ran
  std::optional<absl::Duration> time_to_first_token;  // from arrival
  // From the first to the last token; unset with fewer than two tokens.
  std::optional<absl::Duration> decode;
};

// Is told what happens to requests; the daemon makes metrics and log lines of it.
//
// Called by any thread, several at a time, and on the path of every token: it must not block.
class RequestObserver {
 public:
  virtual ~RequestObserver() = default;

  // A generating call has ended, for whatever reason, a refusal too.
  virtual void OnFinished(const RequestRecord& record) = 0;
  // A generating call was refused at the door; `reason` is its ErrorInfo's, such as QUEUE_FULL.
  // OnFinished follows.
  virtual void OnRejected(std::string_view reason) = 0;
  // The first token came so long after the call.
  virtual void OnFirstToken(absl::Duration since_arrival) = 0;
  // `count` sequences each got a further token so long after the one before. Tokens of one step
  // that waited equally long may be told together.
  virtual void OnTokens(absl::Duration since_last, int64_t count) = 0;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_REQUEST_OBSERVER_H_
