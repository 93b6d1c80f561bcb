#ifndef LATENTD_ENGINE_COMM_NCCL_LOG_H_
#define LATENTD_ENGINE_COMM_NCCL_LOG_H_

#include <map>
#include <optional>
#include <string>

#include "absl/strings/string_view.h"
#include "engine/comm/network_interfaces.h"

namespace latentd {

// What NCCL chose, from its log of a communicator's making (NCCL_DEBUG=INFO): NCCL has no call that
// says it. Lines that say nothing of it are passed over. One thread at a time.
class NcclLog {
 public:
  void AddLine(absl::string_view line);

  // The channels between ranks that go over each transport: "Channel 00/0 : 0[0] -> 8[0] [send] via
  // NET/IB/0/GDRDMA". A plugin's network counts as InfiniBand, which it stands for.
  const std::map<NcclTransport, int>& num_channels() const { return num_channels_; }

  // The slowest that is in use: what bounds a step. Nothing before there is a channel.
  std::optional<NcclTransport> slowest() const;

  // "IB", "Socket" or a plugin's, from "Using network IB": what would carry data to other hosts.
  const std::string& network() const { return network_; }

  // Whether every network channel goes from GPU to card without a copy through the host.
  bool gpu_direct() const { return num_network_channels_ > 0 && num_staged_channels_ == 0; }

  // A loud line when a slower network was chosen than `expected`.
  std::optional<std::string> Warning(NcclTransport expected) const;

 private:
  std::map<NcclTransport, int> num_channels_;
  int num_network_channels_ = 0;
  int num_staged_channels_ = 0;  // network channels through the host's memory
  std::string network_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_NCCL_LOG_H_
