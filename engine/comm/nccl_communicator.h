#ifndef LATENTD_ENGINE_COMM_NCCL_COMMUNICATOR_H_
#define LATENTD_ENGINE_COMM_NCCL_COMMUNICATOR_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"

namespace latentd {

// What the GPU ranks of an expert-parallel group exchange, by NCCL. The library is loaded by name
// when it is first asked for, so that the program serves machines without it.
//
// The collectives are of a stream and return when they are enqueued; they can be captured into a
// graph. All ranks make the same calls in the same order. The current device is the rank's. One
// thread at a time but where a method says otherwise.
//
// An error is final for the communicator: UNAVAILABLE, with NCCL's own words, when a peer is gone
// or Abort() was called.
class NcclCommunicator {
 public:
  // 128 bytes that rank 0 makes and all ranks of one forming are given. UNAVAILABLE without NCCL;
  // FAILED_PRECONDITION as Form().
  static absl::StatusOr<std::string> MakeUniqueId();

  // No peer is waited for yet. UNAVAILABLE without NCCL; INVALID_ARGUMENT for another rank or id
  // than there can be.
  static absl::StatusOr<std::unique_ptr<NcclCommunicator>> Create(int rank, int world_size,
                                                                  const std::string& unique_id);

  // Leaves the group by ncclCommAbort, which needs no peer. Graphs that have captured a collective
  // are destroyed before: NCCL waits for that.
  virtual ~NcclCommunicator() = default;

  // Blocks until all ranks have called it; DEADLINE_EXCEEDED. FAILED_PRECONDITION, with the
  // interfaces that there are, when NCCL would find none. Called once, before all else.
  virtual absl::Status Form(absl::Time deadline) = 0;

  // Fills slots [world_size, bytes]: slot r with what rank r has put there.
  virtual absl::Status AllGather(std::byte* slots, size_t bytes, cudaStream_t stream) = 0;

  // out [count] bf16: the sum over ranks of their in [world_size, count] at this rank, rounded to
  // bf16 at every hop.
  virtual absl::Status ReduceScatterBf16(const void* in, void* out, int64_t count,
                                         cudaStream_t stream) = 0;

  // Not OK once a peer is gone or Abort() was called. Any thread.
  virtual absl::Status Check() = 0;

  // Ends what is under way here, on the GPU too, and every later call, with `why`; the first one
  // counts. Returns at once. Any thread.
  virtual void Abort(const absl::Status& why) = 0;

  // "NCCL 2.28.9". Any thread.
  virtual std::string version() const = 0;

  // What carries the data: TransportName() of the slowest that is in use, as NCCL's log says it;
  // empty where it says nothing: of one rank, before the first collective, and when the environment
  // has the log written elsewhere. Any thread.
  virtual std::string transport() const = 0;

  // A line that says so when InfiniBand was expected and something slower is used; else empty. Any
  // thread.
  virtual std::string warning() const = 0;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_COMM_NCCL_COMMUNICATOR_H_
