#include "server/batch/batch_owner.h"

#include "server/status.h"

namespace latentd {
namespace {

constexpr char kKey[] = "latentd-owner";
constexpr size_t kMaxOwnerBytes = 128;

}  // namespace

std::string OwnerOfPeer(std::string_view peer) {
  if (peer.starts_with("unix")) return "localhost";
  const std::string_view host = peer.substr(0, peer.rfind(':'));
  if (host.starts_with("ipv4:127.") || host == "ipv6:%5B::1%5D" || host == "ipv6:[::1]" ||
      host.starts_with("ipv6:%5B::ffff:127.") || host.starts_with("ipv6:[::ffff:127.")) {
    return "localhost";
  }
  return std::string(host);
}

absl::StatusOr<std::string> OwnerOf(const grpc::CallbackServerContext& context) {
  const auto found = context.client_metadata().find(kKey);
  if (found == context.client_metadata().end()) return OwnerOfPeer(context.peer());
  const grpc::string_ref value = found->second;
  if (value.empty() || value.size() > kMaxOwnerBytes) {
    return MakeBadRequest({{kKey, "is metadata of 1 to 128 bytes"}});
  }
  return std::string(value.data(), value.size());
}

}  // namespace latentd
