#ifndef LATENTD_SERVER_LOCAL_CALLER_H_
#define LATENTD_SERVER_LOCAL_CALLER_H_

#include <cstdint>
#include <functional>
#include <variant>

#include "absl/status/statusor.h"
#include "latentd/v1/inference.pb.h"

namespace latentd {

// What Chat and Complete take and give.
using LocalRequest = std::variant<v1::ChatRequest, v1::CompleteRequest>;
using LocalResponse = std::variant<v1::ChatResponse, v1::CompleteResponse>;

// Runs requests of this process in the background of the clients' own (Request::background): as
// Chat or Complete would, the same responses and errors, but that they take only what the clients
// leave, count against none of their limits, and are in none of their metrics. Thread-safe, and
// nothing blocks.
class LocalCaller {
 public:
  // The caller's name for a call. REQUIRES: no other call that has not ended has it.
  using CallId = uint64_t;
  struct Options {
    int32_t priority = 0;  // among background calls; Serving.priority counts for nothing
    uint64_t seed = 0;     // of a request that has none
  };
  using Done = std::function<void(absl::StatusOr<LocalResponse>)>;

  virtual ~LocalCaller() = default;

  // Sequences that the engine runs at once; 0 while no calls are taken (LOADING, DRAINING).
  virtual int32_t capacity() const = 0;
  // `done` is called once, by a thread of the service or within Start, and must not block.
  virtual void Start(CallId id, LocalRequest request, const Options& options, Done done) = 0;
  // Ends a call with CANCELLED. No-op when it has ended.
  virtual void Cancel(CallId id) = 0;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_LOCAL_CALLER_H_
