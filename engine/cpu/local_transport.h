#ifndef LATENTD_ENGINE_CPU_LOCAL_TRANSPORT_H_
#define LATENTD_ENGINE_CPU_LOCAL_TRANSPORT_H_

#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "engine/cpu/group_transport.h"

namespace latentd {

// The transports of ranks that are threads of this process: [world_size], that of rank r at [r].
// Each forming has LocalCommunicators of its own, whose calls end after `call_timeout`.
//
// Connect() needs no addresses. It ends with DEADLINE_EXCEEDED, naming the missing ranks, or with
// UNAVAILABLE when it was ended for one of the ranks, or a later group is formed.
std::vector<std::unique_ptr<GroupTransport>> MakeLocalTransports(int world_size,
                                                                 absl::Duration call_timeout);

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_LOCAL_TRANSPORT_H_
