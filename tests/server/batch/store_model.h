#ifndef LATENTD_TESTS_SERVER_BATCH_STORE_MODEL_H_
#define LATENTD_TESTS_SERVER_BATCH_STORE_MODEL_H_

#include <cstdint>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"

namespace latentd {

// One thing that is asked of a store.
struct StoreOp {
  enum Kind {
    kUpload,
    kAppend,
    kCommit,
    kAbandon,
    kStart,
    kReturn,
    kEnd,
    kEndJob,
    kFinalize,
    kDelete,
    kRetry,
    kPurge
  };
  Kind kind = kUpload;
  std::string owner, key;
  JobId job = 0;
  int64_t number = 0;  // priority, first item, count, limit; right etag or not; seconds to pass
  std::vector<NewItem> items;
  std::vector<ItemStart> starts;
  std::vector<ItemEnd> ends;
  v1::JobState end_state = v1::JOB_STATE_UNSPECIFIED;
};

// What a BatchStore shall hold, in memory, and what it shall answer.
class StoreModel {
 public:
  absl::StatusCode Apply(const StoreOp& op);
  // Of a kRetry, its first transaction alone.
  absl::StatusCode BeginRetry(const StoreOp& op);
  // A new process has the store.
  void Reopen();

  // All that a reader of the store can see, but names and revisions.
  std::string Describe() const;
  // By job.
  std::map<JobId, std::string> DescribeJobs() const;

  // Something to ask, of this state, mostly sensible.
  StoreOp MakeOp(std::mt19937_64* random) const;

  absl::Time now() const { return now_; }

 private:
  struct Item {
    NewItem item;
    int32_t attempts = 0;
    uint64_t seed = 0;
    v1::ItemState state = v1::ITEM_STATE_UNSPECIFIED;  // of its result
  };
  struct Result {
    int64_t index;
    int32_t attempts;
    std::string outcome;
  };
  struct Job {
    std::string owner, key;
    int32_t priority = 0;
    JobId retry_source = 0;
    v1::JobState state = v1::JOB_STATE_VALIDATING;
    v1::JobState end_state = v1::JOB_STATE_UNSPECIFIED;
    std::vector<Item> items;
    std::vector<Result> results;
    int64_t prompt_tokens = 0, completion_tokens = 0;
    int32_t recoveries = 0;
    int64_t touched = 0, created = 0, started = 0, finalized = 0, ended = 0;  // seconds

    bool active() const {
      return state > v1::JOB_STATE_VALIDATING && state < v1::JOB_STATE_COMPLETED;
    }
    bool has_ended() const { return state >= v1::JOB_STATE_COMPLETED; }
    int64_t num_pending() const {
      return static_cast<int64_t>(items.size()) - static_cast<int64_t>(results.size());
    }
  };

  absl::StatusCode Upload(const StoreOp& op);
  absl::StatusCode Append(const StoreOp& op);
  absl::StatusCode Commit(const StoreOp& op);
  absl::StatusCode Start(const StoreOp& op);
  absl::StatusCode Return(const StoreOp& op);
  absl::StatusCode End(const StoreOp& op);
  absl::StatusCode EndJob(const StoreOp& op);
  absl::StatusCode Finalize(const StoreOp& op);
  absl::StatusCode Delete(const StoreOp& op);
  absl::StatusCode Retry(const StoreOp& op);
  absl::StatusCode Purge(const StoreOp& op);

  Job* Find(JobId job);
  Job* Find(const std::string& owner, const std::string& key);
  bool HasItem(JobId job, int64_t index);
  JobId PickJob(std::mt19937_64* random) const;
  static std::string Describe(JobId id, const Job& job);

  std::map<JobId, Job> jobs_;
  JobId next_id_ = 1;
  absl::Time now_ = absl::FromUnixSeconds(1'700'000'000);
};

// The same of a store.
std::map<JobId, std::string> DescribeJobs(const BatchStore& store);
std::string Describe(const BatchStore& store);

// Asks `store` for it, at `now` of its clock. The items' operations answer later, and others at
// once.
void Ask(const StoreOp& op, absl::Time now, BatchStore* store, BatchStore::Done done);
// That `Ask` of this one wants the answers to all before it.
bool WantsAnswers(const StoreOp& op);

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BATCH_STORE_MODEL_H_
