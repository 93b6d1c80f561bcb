#ifndef LATENTD_ENGINE_COMM_CALL_H_
#define LATENTD_ENGINE_COMM_CALL_H_

#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace latentd {

// The collective calls, and the joining of a group. The values travel between processes.
enum class CallKind : uint32_t {
  kAllGather = 1,
  kAllToAll = 2,
  kReduceScatter = 3,
  kBarrier = 4,
  kJoin = 5,
};

// One call of a communicator. Calls are counted from 1 on; the number of a kJoin is the epoch.
struct Call {
  CallKind kind = CallKind::kBarrier;
  uint64_t number = 0;
};

std::string CallName(CallKind kind);                 // "AllGather"; "call 77" for what is no kind
std::string CallText(const Call& call);              // "AllGather #341"
std::string RanksText(absl::Span<const int> ranks);  // "rank 3", "ranks 3, 5", "no rank"

// What a rank waits in: "AllGather #341 for ranks 3, 5".
std::string WaitText(const Call& call, absl::Span<const int> ranks);

// `error` as the end of a call, or of the waiting for it: its message follows the WaitText().
absl::Status CallError(const Call& call, absl::Span<const int> ranks, const absl::Status& error);

// What Abort(why) ends calls with.
absl::Status AbortError(const absl::Status& why);

// Adds in [n] to sum [n].
void AddTo(absl::Span<const float> in, absl::Span<float> sum);

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_CALL_H_
