#ifndef LATENTD_ENGINE_COMM_TCP_FORMING_H_
#define LATENTD_ENGINE_COMM_TCP_FORMING_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/types/span.h"
#include "engine/comm/socket.h"

namespace latentd {

// The two connections to another rank.
struct PeerSockets {
  Socket data;
  Socket control;
};

struct MeshSpec {
  int64_t epoch = 0;
  int rank = 0;
  std::vector<std::string> addresses;  // [world_size] "host:port"
};

// What the ranks of one group tell each other, and no other's.
uint64_t GroupToken(absl::Span<const std::string> addresses);

// Connects this rank with each other one: it dials those below it, and takes from `listener` those
// above it. A rank that does not answer, or is in another group still or already, is dialled again
// until `deadline`. Connections that are no rank's of this group are closed and change nothing.
// CANCELLED when `interrupt` is readable, or the control connection to a peer is: the caller knows,
// or reads, why. `peers` has what is connected then.
//   interrupt  a descriptor
//   missing    called with the ranks that are not connected yet whenever they change
//   peers      [world_size]; this rank's own stays closed
absl::Status FormMesh(const MeshSpec& spec, const Socket& listener, int interrupt,
                      SteadyTime deadline, absl::FunctionRef<void(absl::Span<const int>)> missing,
                      std::vector<PeerSockets>* peers);

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_TCP_FORMING_H_
