#include "engine/comm/nccl_log.h"

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace latentd {

void NcclLog::AddLine(absl::string_view line) {
  constexpr absl::string_view kNetwork = "Using network ";
  constexpr absl::string_view kVia = " via ";
  const size_t info = line.find("NCCL INFO ");
  if (info == absl::string_view::npos) return;
  absl::string_view text = line.substr(info + sizeof("NCCL INFO ") - 1);
  if (absl::ConsumePrefix(&text, kNetwork)) {
    network_ = std::string(absl::StripAsciiWhitespace(text));
    return;
  }
  const size_t via = text.find(kVia);
  if (via == absl::string_view::npos ||
      (!absl::StartsWith(text, "Channel ") && !absl::StartsWith(text, "CollNet "))) {
    return;
  }
  text.remove_prefix(via + kVia.size());
  if (absl::StartsWith(text, "P2P/")) {
    ++num_channels_[NcclTransport::kP2p];
  } else if (absl::StartsWith(text, "SHM/")) {
    ++num_channels_[NcclTransport::kShm];
  } else if (absl::ConsumePrefix(&text, "NET/") || absl::ConsumePrefix(&text, "COLLNET/")) {
    ++num_channels_[absl::StartsWith(text, "Socket") ? NcclTransport::kSocket
                                                     : NcclTransport::kInfiniband];
    ++num_network_channels_;
    if (!absl::StrContains(text, "GDRDMA")) ++num_staged_channels_;
  }
}

std::optional<NcclTransport> NcclLog::slowest() const {
  if (num_channels_.empty()) return std::nullopt;
  return num_channels_.rbegin()->first;
}

std::optional<std::string> NcclLog::Warning(NcclTransport expected) const {
  const bool sockets = num_channels_.count(NcclTransport::kSocket) > 0 || network_ == "Socket";
  if (expected != NcclTransport::kInfiniband || !sockets) return std::nullopt;
  return absl::StrCat(
      "InfiniBand was expected and NCCL uses sockets",
      " between hosts: steps will be many times slower; NCCL_DEBUG=INFO says why (NET/IB lines)");
}

}  // namespace latentd
