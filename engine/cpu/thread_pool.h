#ifndef LATENTD_ENGINE_CPU_THREAD_POOL_H_
#define LATENTD_ENGINE_CPU_THREAD_POOL_H_

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"

namespace latentd {

// CPUs that this process may use: its affinity mask, and no more than its control group's quota
// (rounded up). At least 1.
int NumAvailableCpus();

// Threads for the short parallel loops of a step; the calling thread is one of them.
//
// A step has hundreds of loops of a few microseconds each, so a worker looks for the next one for
// some 50 us before it sleeps. Between steps all of them sleep. Loops are started by one thread at
// a time.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);  // >= 1, the caller's included
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls task(begin, end, thread) for ranges that cover [0, count) once, each at most `grain`
  // long, on any of the threads, and returns when all are done. 0 <= thread < num_threads(); calls
  // with the same `thread` never overlap. `grain` >= 1. Not reentrant.
  using Task = absl::FunctionRef<void(int64_t begin, int64_t end, int thread)>;
  void For(int64_t count, int64_t grain, Task task);

 private:
  void Work(int thread);
  void TakeRanges(const Task& task, int thread);

  // The loop in progress. Written by the caller while no worker is inside (state_ says so).
  const Task* task_ = nullptr;
  int64_t count_ = 0;
  int64_t grain_ = 1;
  alignas(64) std::atomic<int64_t> next_{0};

  // Bit 0: a loop is open for workers to join; the other bits: workers inside, in units of 2.
  alignas(64) std::atomic<uint32_t> state_{0};
  // Counts loops; a sleeping worker waits for it to change.
  alignas(64) std::atomic<uint32_t> loops_{0};
  std::atomic<int> num_sleeping_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace latentd

#endif  // LATENTD_ENGINE_CPU_THREAD_POOL_H_
