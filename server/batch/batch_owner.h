#ifndef LATENTD_SERVER_BATCH_BATCH_OWNER_H_
#define LATENTD_SERVER_BATCH_BATCH_OWNER_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "grpcpp/server_context.h"

namespace latentd {

// Whose jobs a call is about, until there is authentication: what its metadata `latentd-owner`
// says, else its address. INVALID_ARGUMENT when that metadata is not 1 to 128 bytes.
absl::StatusOr<std::string> OwnerOf(const grpc::CallbackServerContext& context);

// The same of what gRPC calls a peer, such as ipv4:10.0.0.7:41232: without the port, which is
// another in every connection. All addresses of this machine's loopback are one owner.
std::string OwnerOfPeer(std::string_view peer);

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_OWNER_H_
