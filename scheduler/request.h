#ifndef LATENTD_SCHEDULER_REQUEST_H_
#define LATENTD_SCHEDULER_REQUEST_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "engine/step.h"

namespace latentd {

// What a client asked for, checked. Immutable once admitted.
struct Request {
  RequestId id = 0;
  std::vector<TokenId> prompt;          // not empty
  int32_t max_new_tokens = 0;           // >= 1
  int32_t min_new_tokens = 0;           // before that many, no stop token is drawn
  std::vector<TokenId> stop_token_ids;  // the end tokens too, unless the client ignores them
  int32_t priority = 0;                 // higher first
  bool background = false;              // runs on what all others leave
  std::string cache_salt;               // prefixes are shared only under the same salt
  SamplingParams sampling;
};

enum class FinishReason {
  kNone,    // goes on
  kStop,    // drew a stop token
  kLength,  // max_new_tokens, or the model's length
  kError,   // the engine failed; SequenceEvent::error says how
};

// What happened to one request. Values only: events cross threads.
struct SequenceEvent {
  enum class Kind { kStarted, kToken, kFailed };

  RequestId id = 0;
  Kind kind = Kind::kToken;
  int32_t cached_tokens =
      0;  // kStarted: prompt tokens found in the prefix cache; sent once, at the first admission
  TokenId token = 0;                          // kToken
  FinishReason finish = FinishReason::kNone;  // kToken: not kNone with the last one
  absl::Status error = absl::OkStatus();      // kFailed, the last event
  bool suspect = false;  // kFailed: a step with it in its plan failed, so it may be the cause
};

}  // namespace latentd

#endif  // LATENTD_SCHEDULER_REQUEST_H_
