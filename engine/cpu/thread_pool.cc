#include "engine/cpu/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <fstream>
#include <string>

namespace latentd {
namespace {

inline void Pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// CPUs of the control group's quota, v2 then v1; infinity without one.
double QuotaCpus() {
  std::string quota;
  double period = 0.0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period) {
    if (quota != "max" && period > 0.0) return std::atof(quota.c_str()) / period;
    return INFINITY;
  }
  double quota_us = 0.0;
  std::ifstream v1_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us");
  std::ifstream v1_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (v1_quota >> quota_us && v1_period >> period && quota_us > 0.0 && period > 0.0) {
    return quota_us / period;
  }
  return INFINITY;
}

constexpr auto kSpinTime = std::chrono::microseconds(50);
constexpr uint32_t kOpen = 1;
constexpr uint32_t kOneWorker = 2;

}  // namespace

int NumAvailableCpus() {
  int cpus = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t mask;
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) cpus = CPU_COUNT(&mask);
  const double quota = QuotaCpus();
  if (quota < cpus) cpus = static_cast<int>(std::ceil(quota));
  return std::max(cpus, 1);
}

ThreadPool::ThreadPool(int num_threads) {
  workers_.reserve(std::max(num_threads, 1) - 1);
  for (int i = 1; i < num_threads; ++i) workers_.emplace_back([this, i] { Work(i); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  loops_.fetch_add(1);
  loops_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::For(int64_t count, int64_t grain, Task task) {
  if (workers_.empty() || count <= grain) {
    for (int64_t i = 0; i < count; i += grain) task(i, std::min(i + grain, count), 0);
    return;
  }
  task_ = &task;
  count_ = count;
  grain_ = grain;
  next_.store(0, std::memory_order_relaxed);
  state_.store(kOpen, std::memory_order_release);
  // Both of these and the worker's two are sequentially consistent: either the worker sees the new
  // loop before it sleeps, or the caller sees the sleeper.
  loops_.fetch_add(1);
  if (num_sleeping_.load() > 0) loops_.notify_all();

  TakeRanges(task, 0);

  // No range is left. Late workers stay out; the ones inside finish theirs.
  state_.fetch_and(~kOpen, std::memory_order_acq_rel);
  for (int spins = 0; state_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 10000) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void ThreadPool::TakeRanges(const Task& task, int thread) {
  while (true) {
    const int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) return;
    task(begin, std::min(begin + grain_, count_), thread);
  }
}

void ThreadPool::Work(int thread) {
  uint32_t seen = 0;
  while (true) {
    auto deadline = std::chrono::steady_clock::now() + kSpinTime;
    for (int spins = 0; loops_.load(std::memory_order_acquire) == seen; ++spins) {
      Pause();
      if (spins % 64 == 63 && std::chrono::steady_clock::now() > deadline) {
        num_sleeping_.fetch_add(1);
        while (loops_.load() == seen) loops_.wait(seen);
        num_sleeping_.fetch_sub(1);
      }
    }
    seen = loops_.load(std::memory_order_acquire);
    if (stopping_.load()) return;
    uint32_t state = state_.load(std::memory_order_acquire);
    bool joined = false;
    while ((state & kOpen) != 0 && !joined) {
      joined = state_.compare_exchange_weak(state, state + kOneWorker, std::memory_order_acq_rel,
                                            std::memory_order_acquire);
    }
    if (!joined) continue;
    TakeRanges(*task_, thread);
    state_.fetch_sub(kOneWorker, std::memory_order_acq_rel);
  }
}

}  // namespace latentd
