#ifndef LATENTD_ENGINE_CPU_TCP_TRANSPORT_H_
#define LATENTD_ENGINE_CPU_TCP_TRANSPORT_H_

#include <memory>

#include "absl/status/statusor.h"
#include "engine/comm/tcp_listener.h"
#include "engine/cpu/group_transport.h"

namespace latentd {

// The transport of a rank that is a process: it listens from now on, and finds the others by
// GroupSpec::addresses.
absl::StatusOr<std::unique_ptr<GroupTransport>> MakeTcpTransport(
    const TcpListener::Options& options);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_TCP_TRANSPORT_H_
