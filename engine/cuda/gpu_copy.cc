#include "engine/cuda/gpu_copy.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "engine/cuda/cuda_status.h"
#include "engine/cuda/device_memory.h"
#include "engine/cuda/gpu_staging.h"
#include "engine/model/load_jobs.h"
#include "engine/status.h"

namespace latentd {
namespace {

// Large enough to hide what a copy costs to begin; small enough that the buffers of all threads
// stay in the processor's cache until the GPU has fetched them: 16 threads reach 37 GB/s, 30 with 4
// MiB.
constexpr size_t kPieceBytes = size_t{1} << 20;

// One thread's way to the GPU: while one of two pinned buffers is copied the other is filled.
class Stager {
 public:
  // For pieces of up to `bytes`.
  static absl::StatusOr<std::unique_ptr<Stager>> Create(size_t bytes) {
    auto stager = std::unique_ptr<Stager>(new Stager());
    RETURN_IF_CUDA_ERROR(cudaStreamCreateWithFlags(&stager->stream_, cudaStreamNonBlocking));
    for (Slot& slot : stager->slots_) {
      ASSIGN_OR_RETURN(slot.memory, PinnedMemory::Allocate(bytes));
      RETURN_IF_CUDA_ERROR(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming));
    }
    stager->scratch_ = std::make_unique<std::byte[]>(bytes);
    return stager;
  }
  ~Stager() {
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);  // it reads the buffers
    for (Slot& slot : slots_) {
      if (slot.copied != nullptr) cudaEventDestroy(slot.copied);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }
  Stager(const Stager&) = delete;
  Stager& operator=(const Stager&) = delete;

  // Rows [begin, end) of a copy, on their way when it returns.
  absl::Status Put(const WeightCopy& copy, int64_t begin, int64_t end, const ReadBytes& read) {
    Slot& slot = slots_[next_];
    next_ = 1 - next_;
    RETURN_IF_CUDA_ERROR(cudaEventSynchronize(slot.copied));
    RETURN_IF_ERROR(StageRows(copy, begin, end, read, scratch_.get(), slot.memory.data()));
    const RowTarget place = PlaceRows(copy, begin, end);
    if (place.height == 1) {
      RETURN_IF_CUDA_ERROR(cudaMemcpyAsync(place.target, slot.memory.data(), place.width,
                                           cudaMemcpyHostToDevice, stream_));
    } else {
      RETURN_IF_CUDA_ERROR(cudaMemcpy2DAsync(place.target, place.pitch, slot.memory.data(),
                                             place.width, place.width, place.height,
                                             cudaMemcpyHostToDevice, stream_));
    }
    RETURN_IF_CUDA_ERROR(cudaEventRecord(slot.copied, stream_));
    return absl::OkStatus();
  }

  absl::Status Finish() {
    RETURN_IF_CUDA_ERROR(cudaStreamSynchronize(stream_));
    return absl::OkStatus();
  }

 private:
  struct Slot {
    PinnedMemory memory;
    cudaEvent_t copied = nullptr;
  };

  Stager() = default;

  cudaStream_t stream_ = nullptr;
  std::array<Slot, 2> slots_;
  int next_ = 0;
  std::unique_ptr<std::byte[]> scratch_;
};

// As many stagers as threads ask for at once. Thread-safe.
class StagerPool {
 public:
  StagerPool(int device, size_t bytes) : device_(device), bytes_(bytes) {}

  absl::StatusOr<std::unique_ptr<Stager>> Take() {
    {
      absl::MutexLock lock(&mutex_);
      if (!free_.empty()) {
        std::unique_ptr<Stager> stager = std::move(free_.back());
        free_.pop_back();
        return stager;
      }
    }
    return Stager::Create(bytes_);
  }
  void Give(std::unique_ptr<Stager> stager) {
    absl::MutexLock lock(&mutex_);
    free_.push_back(std::move(stager));
  }

  // Runs `put` with a stager, on this thread, with the device current.
  template <typename Put>
  absl::Status With(const Put& put) {
    RETURN_IF_CUDA_ERROR(cudaSetDevice(device_));
    ASSIGN_OR_RETURN(std::unique_ptr<Stager> stager, Take());
    absl::Status status = put(*stager);
    Give(std::move(stager));
    return status;
  }

  absl::Status Finish() {
    absl::MutexLock lock(&mutex_);
    for (const auto& stager : free_) RETURN_IF_ERROR(stager->Finish());
    return absl::OkStatus();
  }

 private:
  const int device_;
  const size_t bytes_;
  absl::Mutex mutex_;
  std::vector<std::unique_ptr<Stager>> free_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace

absl::Status CopyToGpu(const Checkpoint& checkpoint, const std::vector<WeightCopy>& copies,
                       const LoadProgress& progress) {
  int device = 0;
  RETURN_IF_CUDA_ERROR(cudaGetDevice(&device));
  size_t piece_bytes = 0;
  for (const WeightCopy& copy : copies) {
    piece_bytes = std::max(piece_bytes, PieceBytes(copy, PieceRows(copy, kPieceBytes)));
  }
  StagerPool stagers(device, piece_bytes);
  const ReadBytes read = [&checkpoint](const std::byte* begin, size_t size, std::byte* out) {
    return checkpoint.Read(begin, size, out);
  };
  std::vector<LoadJob> jobs;
  for (const WeightCopy& copy : copies) {
    const int64_t step = PieceRows(copy, kPieceBytes);
    for (int64_t begin = 0; begin < copy.num_rows; begin += step) {
      const int64_t end = std::min(begin + step, copy.num_rows);
      const auto bytes =
          static_cast<uint64_t>((end - begin) * copy.num_cols) * DTypeBytes(copy.source->dtype);
      jobs.push_back({bytes, [&copy, begin, end, &read, &stagers] {
                        return stagers.With(
                            [&](Stager& stager) { return stager.Put(copy, begin, end, read); });
                      }});
    }
  }
  RETURN_IF_ERROR(RunLoadJobs(jobs, progress));
  return stagers.Finish();
}

}  // namespace latentd
