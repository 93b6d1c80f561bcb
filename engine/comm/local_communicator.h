#ifndef LATENTD_ENGINE_COMM_LOCAL_COMMUNICATOR_H_
#define LATENTD_ENGINE_COMM_LOCAL_COMMUNICATOR_H_

#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "engine/comm/communicator.h"

namespace latentd {

// A group whose ranks are threads of this process: [world_size], communicator r is rank r's. They
// read each other's buffers, so no call returns before all ranks have read; that part waits for
// nobody else and ends in any case, after an Abort() too.
//
// A call ends with DEADLINE_EXCEEDED when a peer has not made it within `call_timeout`. What ends a
// call for one rank ends it for all. A communicator that is destroyed ends the calls of its peers
// with UNAVAILABLE. `world_size` >= 1.
std::vector<std::unique_ptr<Communicator>> MakeLocalCommunicators(int world_size,
                                                                  absl::Duration call_timeout);

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_LOCAL_COMMUNICATOR_H_
