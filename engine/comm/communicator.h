#ifndef LATENTD_ENGINE_COMM_COMMUNICATOR_H_
#define LATENTD_ENGINE_COMM_COMMUNICATOR_H_

#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/status/status.h"
#include "absl/types/span.h"

namespace latentd {

// What the CPU ranks of an expert-parallel group exchange: LocalCommunicator (ranks are threads of
// one process) and TcpCommunicator (ranks are processes).
//
// Its calls are collective: every rank makes the same calls in the same order, a rank that has
// nothing to give too, and each returns when this rank's part is done. What a call reads and what
// it writes must not overlap. One thread at a time but where a method says otherwise.
//
// An error is final for the communicator: the ranks no longer agree where they are. It names the
// call, its number and the ranks that were waited for; later calls return it again. UNAVAILABLE
// when a peer is gone or Abort() was called, DEADLINE_EXCEEDED when a peer did not come in time,
// INTERNAL when peers disagree about the call or its sizes.
class Communicator {
 public:
  virtual ~Communicator() = default;

  virtual int rank() const = 0;        // [0, world_size)
  virtual int world_size() const = 0;  // >= 1

  // out [world_size, in.size()]: every rank's `in`, which has the same size on all ranks.
  virtual absl::Status AllGather(absl::Span<const std::byte> in, absl::Span<std::byte> out) = 0;

  // Sends to[r] to rank r and fills from[r] with what rank r sent here, this rank's own part
  // included. from[r].size() is what rank r gives as to[rank()].size(); 0 is allowed.
  //   to, from  [world_size]
  virtual absl::Status AllToAll(absl::Span<const absl::Span<const std::byte>> to,
                                absl::Span<const absl::Span<std::byte>> from) = 0;

  // out [n] f32: the sum over ranks, added in rank order from rank 0 on, of each one's
  // in [world_size, n] at [rank()]. The same n on all ranks.
  virtual absl::Status ReduceScatter(absl::Span<const float> in, absl::Span<float> out) = 0;

  // Returns when every rank has called it.
  virtual absl::Status Barrier() = 0;

  // Ends the call under way, here and by and by on the peers, and every later one, with UNAVAILABLE
  // and the message of `why`. Any thread; the first one counts.
  virtual void Abort(const absl::Status& why) = 0;

  // What this rank waits in now, for whom: "AllGather #341 for ranks 3, 5"; empty while it
  // computes. Any thread.
  virtual std::string waiting_in() const = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_COMMUNICATOR_H_
