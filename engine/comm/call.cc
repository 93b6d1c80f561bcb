#include "engine/comm/call.h"

#include <cstddef>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace latentd {

std::string CallName(CallKind kind) {
  switch (kind) {
    case CallKind::kAllGather:
      return "AllGather";
    case CallKind::kAllToAll:
      return "AllToAll";
    case CallKind::kReduceScatter:
      return "ReduceScatter";
    case CallKind::kBarrier:
      return "Barrier";
    case CallKind::kJoin:
      return "Join";
  }
  return absl::StrCat("call ", static_cast<uint32_t>(kind));
}

std::string CallText(const Call& call) {
  return absl::StrCat(CallName(call.kind), " #", call.number);
}

std::string RanksText(absl::Span<const int> ranks) {
  if (ranks.empty()) return "no rank";
  return absl::StrCat(ranks.size() == 1 ? "rank " : "ranks ", absl::StrJoin(ranks, ", "));
}

std::string WaitText(const Call& call, absl::Span<const int> ranks) {
  if (ranks.empty()) return CallText(call);
  return absl::StrCat(CallText(call), " for ", RanksText(ranks));
}

absl::Status CallError(const Call& call, absl::Span<const int> ranks, const absl::Status& error) {
  return absl::Status(error.code(), absl::StrCat(WaitText(call, ranks), ": ", error.message()));
}

absl::Status AbortError(const absl::Status& why) {
  return absl::UnavailableError(absl::StrCat("aborted: ", why.message()));
}

void AddTo(absl::Span<const float> in, absl::Span<float> sum) {
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += in[i];
}

}  // namespace latentd
