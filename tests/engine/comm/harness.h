#ifndef LATENTD_TESTS_ENGINE_COMM_HARNESS_H_
#define LATENTD_TESTS_ENGINE_COMM_HARNESS_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "engine/comm/communicator.h"

namespace latentd {

using Group = std::vector<std::unique_ptr<Communicator>>;  // [world_size]

// Ranks that each listen on a port of this host, and have joined group 1.
Group MakeTcpGroup(int world_size, absl::Duration call_timeout);

// Calls f(rank) on a thread of its own for each rank, and returns what they return.
std::vector<absl::Status> OnRanks(int num_ranks, const std::function<absl::Status(int)>& f);

// Waits until `condition` holds; false after 20 s.
bool Eventually(const std::function<bool()>& condition);

// A random sequence of collective calls, the same on all ranks for the same seed. Every byte that a
// rank receives is compared with what the model of the calls says. Returns the first error.
struct RandomCalls {
  uint64_t seed = 0;
  int num_calls = 100;
  size_t max_bytes = 5000;  // that one rank gives one other
};
absl::Status MakeRandomCalls(const RandomCalls& calls, Communicator* communicator);

}  // namespace latentd

#endif  // LATENTD_TESTS_ENGINE_COMM_HARNESS_H_
