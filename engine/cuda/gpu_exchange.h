#ifndef LATENTD_ENGINE_CUDA_GPU_EXCHANGE_H_
#define LATENTD_ENGINE_CUDA_GPU_EXCHANGE_H_

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "engine/group_member.h"

namespace latentd {

// What the experts of a group exchange: each rank's tokens go to all ranks, and what their experts
// made of them comes back. An engine that is alone has none.
//
// Dispatch() and Combine() are collective: all ranks make the same calls, with the same sizes, in
// the same order. They are of one stream: a call takes what was enqueued before it, and what is
// enqueued after it finds the result. One thread but where a method says otherwise.
class GpuExchange {
 public:
  virtual ~GpuExchange() = default;

  // Blocks until all ranks are there. UNAVAILABLE, DEADLINE_EXCEEDED. Called once, before all else.
  virtual absl::Status Form(absl::Time deadline) = 0;

  // Fills slots [world_size, bytes]: slot r with what rank r has put there. `bytes` is a multiple
  // of 16.
  virtual absl::Status Dispatch(std::byte* slots, size_t bytes, cudaStream_t stream) = 0;

  // out [count]: the sum over all ranks of their `sums` [world_size, count] at this rank. `count`
  // is a multiple of 8.
  virtual absl::Status Combine(const __nv_bfloat16* sums, int64_t count, __nv_bfloat16* out,
                               cudaStream_t stream) = 0;

  // Whether the calls can be captured into a graph.
  virtual bool capturable() const = 0;

  // Not OK once a peer is gone or Abort() was called: what has been enqueued may be wrong, but
  // ends. For who waits for a step.
  virtual absl::Status Check() = 0;

  // Ends what is under way, here and on the GPU, and all calls that follow with `why`; the first
  // one counts. Returns at once. Any thread.
  virtual void Abort(const absl::Status& why) = 0;

  // What the host waits in, for whom; empty when it does not, or does not know. Any thread.
  virtual std::string waiting_in() const { return ""; }

  // What carries the data: "NVLink", "InfiniBand", "local"; "NCCL 2.28.9" where that is not known.
  // Any thread.
  virtual std::string transport() const = 0;
  virtual std::string warning() const { return ""; }  // about it; empty when there is none
};

// Makes the exchange of one forming of the group; nobody is waited for yet.
using ExchangeFactory =
    std::function<absl::StatusOr<std::shared_ptr<GpuExchange>>(const GroupSpec& group)>;

}  // namespace latentd

#endif  // LATENTD_ENGINE_CUDA_GPU_EXCHANGE_H_
