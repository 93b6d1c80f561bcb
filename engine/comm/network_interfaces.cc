#include "engine/comm/network_interfaces.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <system_error>
#include <tuple>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "engine/comm/socket.h"

namespace latentd {
namespace {

std::string Variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

// The address that NCCL could use; empty for others.
std::string UsableAddress(const sockaddr* address) {
  if (address == nullptr) return "";
  char text[INET6_ADDRSTRLEN] = "";
  if (address->sa_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text,
              sizeof(text));
  } else if (address->sa_family == AF_INET6) {
    const in6_addr& in6 = reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
    if (!IN6_IS_ADDR_LOOPBACK(&in6)) inet_ntop(AF_INET6, &in6, text, sizeof(text));
  }
  return text;
}

std::string Describe(const NetworkInterface& interface) {
  if (!interface.up) return absl::StrCat(interface.name, " (down)");
  if (interface.addresses.empty()) return absl::StrCat(interface.name, " (no address)");
  return absl::StrCat(interface.name, " (", absl::StrJoin(interface.addresses, ", "), ")");
}

std::string FirstLine(const std::filesystem::path& path) {
  std::string line;
  std::ifstream file(path);
  std::getline(file, line);
  return std::string(absl::StripAsciiWhitespace(line));
}

// NCCL takes a variable of one character for none.
bool IsSet(const std::string& variable) { return variable.size() > 1; }

bool InfinibandDisabled(const NcclNetworkSettings& settings) {
  int value = 0;
  return (absl::SimpleAtoi(settings.ib_disable, &value) && value != 0) ||
         absl::EqualsIgnoreCase(settings.net, "Socket");
}

bool MayUse(const NcclNetworkSettings& settings, const InfinibandPort& port) {
  return port.active && !InfinibandDisabled(settings) &&
         InterfaceFilter(settings.ib_hca).Matches(port.device, port.port);
}

}  // namespace

NcclNetworkSettings NcclNetworkSettings::FromEnvironment() {
  return {.socket_ifname = Variable("NCCL_SOCKET_IFNAME"),
          .ib_hca = Variable("NCCL_IB_HCA"),
          .ib_disable = Variable("NCCL_IB_DISABLE"),
          .net = Variable("NCCL_NET")};
}

absl::StatusOr<std::vector<NetworkInterface>> ListNetworkInterfaces() {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) {
    return absl::InternalError(absl::StrCat("getifaddrs: ", ErrorText(errno)));
  }
  std::vector<NetworkInterface> interfaces;
  for (const ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    auto known = std::find_if(interfaces.begin(), interfaces.end(),
                              [&](const NetworkInterface& i) { return i.name == entry->ifa_name; });
    if (known == interfaces.end()) {
      known = interfaces.insert(known, {.name = entry->ifa_name, .addresses = {}});
    }
    constexpr unsigned kUp = IFF_UP | IFF_RUNNING;
    known->up = known->up || (entry->ifa_flags & kUp) == kUp;
    std::string address = UsableAddress(entry->ifa_addr);
    if (!address.empty()) known->addresses.push_back(std::move(address));
  }
  freeifaddrs(list);
  return interfaces;
}

InterfaceFilter::InterfaceFilter(absl::string_view text) {
  exclude_ = absl::ConsumePrefix(&text, "^");
  exact_ = absl::ConsumePrefix(&text, "=");
  for (const absl::string_view entry : absl::StrSplit(text, ',', absl::SkipEmpty())) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(entry, absl::MaxSplits(':', 1));
    int port = -1;
    if (!absl::SimpleAtoi(parts.second, &port)) port = -1;
    entries_.push_back({.name = std::string(parts.first), .port = port});
  }
}

bool InterfaceFilter::Matches(absl::string_view name, int port) const {
  // An empty list matches all, so that an empty list of exclusions excludes all: as in NCCL.
  const bool listed =
      entries_.empty() || std::any_of(entries_.begin(), entries_.end(), [&](const Entry& entry) {
        const bool same = exact_ ? name == entry.name : absl::StartsWith(name, entry.name);
        return same && (entry.port < 0 || port < 0 || entry.port == port);
      });
  return listed != exclude_;
}

absl::StatusOr<std::vector<std::string>> FindSocketInterfaces(
    const NcclNetworkSettings& settings, absl::Span<const NetworkInterface> interfaces) {
  std::vector<std::string> found;
  const auto find = [&](const std::function<bool(const std::string&)>& wanted) {
    for (const NetworkInterface& interface : interfaces) {
      if (interface.up && !interface.addresses.empty() && wanted(interface.name)) {
        found.push_back(interface.name);
      }
    }
    return !found.empty();
  };
  const auto starts_with = [](const char* prefix) {
    return [prefix](const std::string& name) { return absl::StartsWith(name, prefix); };
  };
  if (IsSet(settings.socket_ifname)) {
    const InterfaceFilter filter(settings.socket_ifname);
    if (find([&](const std::string& name) { return filter.Matches(name); })) return found;
  } else if (find(starts_with("ib")) || find([](const std::string& name) {
               return !absl::StartsWith(name, "docker") && !absl::StartsWith(name, "lo");
             }) ||
             find(starts_with("docker")) || find(starts_with("lo"))) {
    return found;
  }
  std::vector<std::string> all;
  for (const NetworkInterface& interface : interfaces) all.push_back(Describe(interface));
  return absl::FailedPreconditionError(
      absl::StrCat(IsSet(settings.socket_ifname)
                       ? absl::StrCat("NCCL_SOCKET_IFNAME=", settings.socket_ifname,
                                      " matches no network interface that is up and has an address")
                       : "no network interface is up and has an address",
                   "; there are: ", all.empty() ? "none" : absl::StrJoin(all, ", ")));
}

std::vector<InfinibandPort> ListInfinibandPorts(const std::filesystem::path& root) {
  std::vector<InfinibandPort> ports;
  std::error_code error;
  for (const auto& device : std::filesystem::directory_iterator(root, error)) {
    std::error_code no_ports;
    for (const auto& port :
         std::filesystem::directory_iterator(device.path() / "ports", no_ports)) {
      InfinibandPort next{.device = device.path().filename(),
                          .state = FirstLine(port.path() / "state"),
                          .rate = FirstLine(port.path() / "rate")};
      if (!absl::SimpleAtoi(port.path().filename().string(), &next.port)) continue;
      next.active =
          absl::StrContains(next.state, "ACTIVE") && !absl::StrContains(next.state, "ACTIVE_DEFER");
      next.ethernet = FirstLine(port.path() / "link_layer") == "Ethernet";
      ports.push_back(std::move(next));
    }
  }
  std::sort(ports.begin(), ports.end(), [](const InfinibandPort& a, const InfinibandPort& b) {
    return std::tie(a.device, a.port) < std::tie(b.device, b.port);
  });
  return ports;
}

std::string TransportName(NcclTransport transport) {
  switch (transport) {
    case NcclTransport::kP2p:
      return "NVLink";
    case NcclTransport::kShm:
      return "SHM";
    case NcclTransport::kInfiniband:
      return "InfiniBand";
    case NcclTransport::kSocket:
      return "socket";
  }
  return "unknown";
}

NcclTransport ExpectedNetwork(const NcclNetworkSettings& settings,
                              absl::Span<const InfinibandPort> ports) {
  const bool any = std::any_of(ports.begin(), ports.end(),
                               [&](const InfinibandPort& port) { return MayUse(settings, port); });
  return any ? NcclTransport::kInfiniband : NcclTransport::kSocket;
}

std::string DescribeInfiniband(const NcclNetworkSettings& settings,
                               absl::Span<const InfinibandPort> ports) {
  if (ports.empty()) return "no InfiniBand device";
  return absl::StrJoin(ports, ", ", [&](std::string* out, const InfinibandPort& port) {
    absl::StrAppend(out, port.device, ":", port.port, " ", port.ethernet ? "RoCE" : "InfiniBand",
                    " ", port.rate, " ", port.state);
    if (!port.active || MayUse(settings, port)) return;
    absl::StrAppend(out, " excluded by ",
                    InfinibandDisabled(settings) ? "NCCL_IB_DISABLE or NCCL_NET" : "NCCL_IB_HCA");
  });
}

}  // namespace latentd
