// What the store of batch jobs sustains: items uploaded, items finished, and how long a commit
// takes. Every figure is durable: counted when the callback says that it is on stable storage.
//
//   build/tests/server/batch/batch_store_benchmark
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <string>
#include <vector>

#include "absl/synchronization/blocking_counter.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "benchmark/benchmark.h"
#include "engine/status.h"
#include "tests/server/batch/store_fixture.h"

namespace latentd {
namespace {

constexpr int64_t kNumItems = 100'000;
constexpr int64_t kItemsOfAppend = 500;  // a frame of an upload: a quarter of a megabyte
constexpr int kAppendsOnTheWay = 4;
constexpr int kItemsOnTheWay = 512;  // of the runner, each started and ended by itself
constexpr size_t kItemBytes = 500;

int64_t ResidentBytes() {
  std::ifstream statm("/proc/self/statm");
  int64_t total = 0, resident = 0;
  statm >> total >> resident;
  return resident * sysconf(_SC_PAGESIZE);
}

std::unique_ptr<BatchStore> OpenStore(const StoreFolder& folder) {
  auto store = BatchStore::Open({.directory = folder.path()});
  LATENTD_CHECK(store.ok());
  return *std::move(store);
}

// So many may be on the way; the rest waits.
class Window {
 public:
  explicit Window(int size) : size_(size), free_(size) {}
  void Take() {
    absl::MutexLock lock(&mutex_);
    mutex_.Await(absl::Condition(
        +[](int* free) { return *free > 0; }, &free_));
    --free_;
  }
  void Give(const absl::Status& status) {
    LATENTD_CHECK(status.ok());
    absl::MutexLock lock(&mutex_);
    ++free_;
  }
  void AwaitAll() {
    absl::MutexLock lock(&mutex_);
    const auto all = [this] { return free_ == size_; };
    mutex_.Await(absl::Condition(&all));
  }

 private:
  const int size_;
  absl::Mutex mutex_;
  int free_;
};

std::vector<NewItem> BigItems(int64_t first) {
  std::vector<NewItem> items = MakeItems(first, std::min(kItemsOfAppend, kNumItems - first));
  for (NewItem& item : items) item.request.resize(kItemBytes, 'x');
  return items;
}

JobId Upload(BatchStore* store, const std::string& key) {
  const auto upload = store->OpenUpload("ann", key, MakeSpec());
  LATENTD_CHECK(upload.ok());
  const JobId job = upload->record.id;
  Window window(kAppendsOnTheWay);
  for (int64_t first = 0; first < kNumItems; first += kItemsOfAppend) {
    window.Take();
    store->AppendItems(job, first, BigItems(first),
                       [&](const absl::Status& status) { window.Give(status); });
  }
  window.AwaitAll();
  LATENTD_CHECK(store->CommitUpload(job, kNumItems, 10).ok());
  return job;
}

void SetCommitTime(const BatchStore& store, benchmark::State* state) {
  const auto stats = store.Stats();
  LATENTD_CHECK(stats.ok());
  state->counters["commit_ms"] =
      absl::ToDoubleMilliseconds(stats->commit_time) / static_cast<double>(stats->num_commits);
  state->counters["commits"] = static_cast<double>(stats->num_commits);
  state->counters["disk_MB"] = static_cast<double>(stats->bytes) / 1e6;
}

// From the first append to the job being QUEUED.
void BM_Upload(benchmark::State& state) {
  for (auto _ : state) {
    StoreFolder folder;
    const std::unique_ptr<BatchStore> store = OpenStore(folder);
    const int64_t before = ResidentBytes();
    const absl::Time begin = absl::Now();
    Upload(store.get(), "key");
    state.SetIterationTime(absl::ToDoubleSeconds(absl::Now() - begin));
    state.counters["memory_MB"] = static_cast<double>(ResidentBytes() - before) / 1e6;
    SetCommitTime(*store, &state);
  }
  state.SetItemsProcessed(state.iterations() * kNumItems);
}
BENCHMARK(BM_Upload)->UseManualTime()->Iterations(3)->Unit(benchmark::kMillisecond);

// The runner's way: each item is read, its start is durable before it runs, and its end is one
// operation, many of which share a commit.
void BM_Run(benchmark::State& state) {
  for (auto _ : state) {
    StoreFolder folder;
    const std::unique_ptr<BatchStore> store = OpenStore(folder);
    const JobId job = Upload(store.get(), "key");
    const int64_t before = ResidentBytes();
    const absl::Time begin = absl::Now();
    Window window(kItemsOnTheWay);
    for (int64_t next = 0; next < kNumItems;) {
      const auto items = store->ReadPending(job, next, 256, 1 << 20);
      LATENTD_CHECK(items.ok() && !items->empty());
      for (const PendingItem& item : *items) {
        window.Take();
        store->StartItems({{job, item.index, 7}}, [&,
                                                   index = item.index](const absl::Status& status) {
          LATENTD_CHECK(status.ok());
          ItemEnd end = Succeed(job, index);
          end.result.mutable_complete()->mutable_request_id()->resize(kItemBytes, 'y');
          store->EndItems({std::move(end)}, [&](const absl::Status& ended) { window.Give(ended); });
        });
      }
      next = items->back().index + 1;
    }
    window.AwaitAll();
    LATENTD_CHECK(*store->FinalizeSome(job, 1));
    state.SetIterationTime(absl::ToDoubleSeconds(absl::Now() - begin));
    state.counters["memory_MB"] = static_cast<double>(ResidentBytes() - before) / 1e6;
    SetCommitTime(*store, &state);
  }
  state.SetItemsProcessed(state.iterations() * kNumItems);
}
BENCHMARK(BM_Run)->UseManualTime()->Iterations(2)->Unit(benchmark::kMillisecond);

// One caller that waits for each.
void BM_Commit(benchmark::State& state) {
  StoreFolder folder;
  const std::unique_ptr<BatchStore> store = OpenStore(folder);
  const JobId job = Upload(store.get(), "key");
  int64_t index = 0;
  for (auto _ : state) LATENTD_CHECK(End(store.get(), {Succeed(job, index++)}).ok());
}
BENCHMARK(BM_Commit)->UseRealTime()->Iterations(500)->Unit(benchmark::kMicrosecond);

void BM_ReadResults(benchmark::State& state) {
  StoreFolder folder;
  const std::unique_ptr<BatchStore> store = OpenStore(folder);
  const JobId job = Upload(store.get(), "key");
  LATENTD_CHECK(FinishJob(store.get(), job).ok());
  for (auto _ : state) {
    int64_t after = 0;
    while (true) {
      const auto results = store->ReadResults(job, after, 1000, 256 << 10);
      LATENTD_CHECK(results.ok());
      if (results->empty()) break;
      after = results->back().sequence;
    }
    LATENTD_CHECK(after == kNumItems);
  }
  state.SetItemsProcessed(state.iterations() * kNumItems);
}
BENCHMARK(BM_ReadResults)->UseRealTime()->Unit(benchmark::kMillisecond);

// The whole of a job at once: expired before an item had run, then deleted.
void BM_FinalizeAndPurge(benchmark::State& state) {
  for (auto _ : state) {
    StoreFolder folder;
    const std::unique_ptr<BatchStore> store = OpenStore(folder);
    const JobId job = Upload(store.get(), "key");
    LATENTD_CHECK(store->EndJob(job, v1::JOB_STATE_EXPIRED, "").ok());
    const absl::Time begin = absl::Now();
    LATENTD_CHECK(*store->FinalizeSome(job, kNumItems));
    LATENTD_CHECK(store->DeleteJob(job, "").ok());
    for (int i = 0; i < 3; ++i) LATENTD_CHECK(store->Purge(absl::InfinitePast()).ok());
    state.SetIterationTime(absl::ToDoubleSeconds(absl::Now() - begin));
    SetCommitTime(*store, &state);
  }
}
BENCHMARK(BM_FinalizeAndPurge)->UseManualTime()->Iterations(1)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace latentd

BENCHMARK_MAIN();
