#ifndef LATENTD_ENGINE_COMM_NETWORK_INTERFACES_H_
#define LATENTD_ENGINE_COMM_NETWORK_INTERFACES_H_

#include <filesystem>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace latentd {

// What can be said about NCCL's network before ncclCommInitRank, which answers a wrong
// NCCL_SOCKET_IFNAME with "no socket interface found" and falls back from InfiniBand without a
// word.

// The variables of NCCL's that choose a network. Empty: not set.
struct NcclNetworkSettings {
  std::string socket_ifname = "";  // NCCL_SOCKET_IFNAME
  std::string ib_hca = "";         // NCCL_IB_HCA
  std::string ib_disable = "";     // NCCL_IB_DISABLE
  std::string net = "";            // NCCL_NET

  static NcclNetworkSettings FromEnvironment();
};

struct NetworkInterface {
  std::string name;
  std::vector<std::string> addresses;  // IPv4, and IPv6 but the loopback's: those NCCL can use
  bool up = false;                     // and running
};

// In the order of the kernel; an interface without addresses is among them.
absl::StatusOr<std::vector<NetworkInterface>> ListNetworkInterfaces();

// The syntax that NCCL_SOCKET_IFNAME and NCCL_IB_HCA share: prefixes of names separated by commas;
// "=" before the list: whole names; "^" before that: all but these. A name may be followed by
// ":port" for NCCL_IB_HCA.
class InterfaceFilter {
 public:
  explicit InterfaceFilter(absl::string_view text);

  bool Matches(absl::string_view name, int port = -1) const;

 private:
  struct Entry {
    std::string name;
    int port;  // -1: any
  };
  bool exclude_ = false;
  bool exact_ = false;
  std::vector<Entry> entries_;  // none: all
};

// The interfaces that NCCL finds for its sockets, best first: those that NCCL_SOCKET_IFNAME
// matches; when it is not set, those that begin with "ib", else all but docker's and the loopback,
// else those. FAILED_PRECONDITION when there is none; the message lists the interfaces that there
// are.
absl::StatusOr<std::vector<std::string>> FindSocketInterfaces(
    const NcclNetworkSettings& settings, absl::Span<const NetworkInterface> interfaces);

struct InfinibandPort {
  std::string device;     // mlx5_0
  int port = 1;           // from 1 on
  bool active = false;    // state ACTIVE
  bool ethernet = false;  // RoCE; else InfiniBand
  std::string state;      // as the kernel says it: "4: ACTIVE"
  std::string rate;       // "400 Gb/sec (4X NDR)"
};

// Of all devices, by name and port; empty on a machine without. `root` is for tests.
std::vector<InfinibandPort> ListInfinibandPorts(
    const std::filesystem::path& root = "/sys/class/infiniband");

// What carries the data between two ranks, fastest first.
enum class NcclTransport {
  kP2p,         // NVLink where the GPUs have it, else PCIe
  kShm,         // shared memory of one host
  kInfiniband,  // RoCE too
  kSocket,
};
std::string TransportName(NcclTransport transport);  // "NVLink", "SHM", "InfiniBand", "socket"

// What to expect between hosts: InfiniBand when a port is active and the settings do not exclude
// it.
NcclTransport ExpectedNetwork(const NcclNetworkSettings& settings,
                              absl::Span<const InfinibandPort> ports);

// A line for the log that says which ports there are and whether NCCL may use them.
std::string DescribeInfiniband(const NcclNetworkSettings& settings,
                               absl::Span<const InfinibandPort> ports);

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_NETWORK_INTERFACES_H_
