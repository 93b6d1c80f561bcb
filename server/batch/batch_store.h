#ifndef LATENTD_SERVER_BATCH_BATCH_STORE_H_
#define LATENTD_SERVER_BATCH_BATCH_STORE_H_

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "latentd/v1/batch.pb.h"

namespace latentd {

// A job's row in the store; never used again.
using JobId = int64_t;

// A job as it is stored.
struct JobRecord {
  JobId id = 0;
  std::string owner;
  v1::Job job;  // counts.running is 0: who runs items adds it, and takes it from counts.pending
  // What FINALIZING and CANCELLING end in.
  v1::JobState end_state = v1::JOB_STATE_UNSPECIFIED;
};

// An item of an upload.
struct NewItem {
  std::string custom_id;
  std::string request;  // a serialized BatchItem, as it was sent
};

// An item without a result.
struct PendingItem {
  int64_t index = 0;
  std::string custom_id;
  std::string request;   // as NewItem
  int32_t attempts = 0;  // begun so often, not counting what was returned
  uint64_t seed = 0;     // given to it when it was first begun; 0: never begun
};

// An item that begins now. REQUIRES: it has no result.
struct ItemStart {
  JobId job = 0;
  int64_t index = 0;
  uint64_t seed = 0;  // not 0; kept for all attempts
};

// An item's end.
struct ItemEnd {
  JobId job = 0;
  v1::ItemResult result;  // index, state and outcome; the store adds custom_id and attempts
  // Of a success.
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
};

struct JobFilter {
  std::string owner = "";                                          // empty: all
  std::vector<v1::JobState> states = {};                           // empty: all but VALIDATING
  std::vector<std::pair<std::string, std::string>> metadata = {};  // all of these
};

// What the store holds; for metrics and quotas.
struct StoreStats {
  std::vector<std::pair<v1::JobState, int64_t>> jobs;
  int64_t items_pending = 0;
  int64_t items_ended[4] = {};  // succeeded, failed, cancelled, expired: since the start
  absl::Time oldest_pending = absl::InfiniteFuture();   // create_time of its job
  absl::Time earliest_expiry = absl::InfiniteFuture();  // of jobs that have not ended
  int64_t recoveries = 0;                               // jobs that this start found under way
  int64_t bytes = 0;                                    // the files
  bool failed = false;                                  // nothing more is written
  int64_t num_commits = 0;
  absl::Duration commit_time;  // over all commits
};

// Jobs, items and results on disk: SQLite in WAL mode, synchronous=FULL, in one directory that one
// process uses at a time.
//
// One thread writes. What is asked for while it commits becomes the next transaction (group
// commit), in the order in which it was asked for; `Done` is called by that thread once it is on
// stable storage, and must not block. The methods that return a status wait for that. Reads have
// connections of their own and see what is committed. Any thread may call anything.
//
// After a failed write (a full disk, a failed fsync) nothing more is written: what waits and all
// that is asked for later fails with UNAVAILABLE, reason STORE_FAILED. Reads go on, and see the
// last commit. A new process finds that too, or, in whole, the transaction that failed.
class BatchStore {
 public:
  struct Options {
    std::filesystem::path directory;  // made when it is not there
    std::string vfs = "";             // SQLite's; empty: its default. For tests that inject faults
    // Called by the writing thread after a commit, with the jobs that it changed; must not block.
    std::function<void(const std::vector<JobId>&)> on_change = nullptr;
    // Called by the writing thread after each commit, with how long it took; must not block.
    std::function<void(absl::Duration)> on_commit = nullptr;
    std::function<absl::Time()> now = absl::Now;
    // Pages of 4 KiB in the journal after which they are moved into the database.
    int checkpoint_pages = 4096;
  };
  using Done = std::function<void(const absl::Status&)>;

  // Opens or makes the store, migrates an older one, and takes stock after a crash: what ran is
  // pending again. FAILED_PRECONDITION when a newer version wrote it or another process has it
  // open.
  static absl::StatusOr<std::unique_ptr<BatchStore>> Open(Options options);
  ~BatchStore();  // writes what was asked for

  BatchStore(const BatchStore&) = delete;
  BatchStore& operator=(const BatchStore&) = delete;

  // ---- uploads ----

  // An upload is a row of its own from the start, and its owner's quota counts it (UsageOf). What
  // is refused by an upload's state is FAILED_PRECONDITION.

  // How far an upload of this owner's key has come, or the job that it became.
  struct Upload {
    JobRecord record;    // state VALIDATING until it is committed
    int64_t item_count;  // stored
    std::string sha256;  // the chain over them, as CreateJobRequest.Commit says
    bool is_new = false;
  };
  // Goes on with the upload of this key, or begins one. ALREADY_EXISTS when its spec is another, or
  // RetryJob made it.
  absl::StatusOr<Upload> OpenUpload(std::string_view owner, std::string_view request_id,
                                    const v1::JobSpec& spec);
  // NOT_FOUND, reason UPLOAD_NOT_FOUND.
  absl::StatusOr<Upload> GetUpload(std::string_view owner, std::string_view request_id) const;
  // Stores items [first, first + size) of an upload. FAILED_PRECONDITION when `first` is not how
  // many are stored: another call uploads too. What waits is held in memory: a caller has no more
  // on the way than a few, and begins the next when `done` comes.
  void AppendItems(JobId job, int64_t first, std::vector<NewItem> items, Done done);
  // The chain value of the first `count` stored items.
  absl::StatusOr<std::string> ChainOf(JobId job, int64_t count) const;
  // Items whose custom_id an earlier one of the upload has, in order; at most `limit`.
  struct Duplicate {
    int64_t index = 0;
    int64_t first_index = 0;  // the earliest with that custom_id
    std::string custom_id;
  };
  absl::StatusOr<std::vector<Duplicate>> FindDuplicates(JobId job, int limit) const;
  // Makes it a job, QUEUED. INVALID_ARGUMENT, a violation each, when custom_ids are not unique
  // (`items[7].custom_id`; at most `max_violations`), or the count is another (then the upload is
  // as before). The job, when it was committed already.
  absl::StatusOr<JobRecord> CommitUpload(JobId job, int64_t item_count, int max_violations);
  // Forgets an upload that was not committed: its key is free again. No-op for others.
  absl::Status AbandonUpload(JobId job);

  // ---- jobs ----

  absl::StatusOr<JobRecord> GetJob(std::string_view name) const;  // NOT_FOUND, reason JOB_NOT_FOUND
  absl::StatusOr<JobRecord> GetJob(JobId id) const;
  // Newest first, those with an id below `before`.
  absl::StatusOr<std::vector<JobRecord>> ListJobs(const JobFilter& filter, JobId before,
                                                  int limit) const;
  // QUEUED to CANCELLING, in the order of their commits.
  absl::StatusOr<std::vector<JobRecord>> ActiveJobs() const;
  absl::StatusOr<StoreStats> Stats() const;
  // Jobs and items of an owner that have not ended; uploads too.
  struct Usage {
    int64_t jobs = 0;
    int64_t items = 0;
  };
  absl::StatusOr<Usage> UsageOf(std::string_view owner) const;

  // Ends the running of a job's items: QUEUED or IN_PROGRESS becomes FINALIZING (for CANCELLED:
  // CANCELLING), with this end state and reason. The job as it is now; no-op when that has happened
  // already. REQUIRES: end_state FAILED, EXPIRED or CANCELLED.
  absl::StatusOr<JobRecord> EndJob(JobId job, v1::JobState end_state, std::string_view reason);
  // Gives up to `limit` items without a result the result that fits the job's end state (CANCELLED
  // or EXPIRED). True when none are left: then the job is in its end state. REQUIRES: FINALIZING or
  // CANCELLING, and nothing of it runs.
  absl::StatusOr<bool> FinalizeSome(JobId job, int64_t limit);
  absl::Status DeleteJob(JobId job, std::string_view etag);  // as BatchService.DeleteJob
  // A new job of what has no success in an ended one; the job that there is, when it was made
  // already. FAILED_PRECONDITION when the old one has not ended or all of it has a success;
  // ALREADY_EXISTS when the key is that of another job.
  absl::StatusOr<Upload> RetryJob(JobId job, std::string_view owner, std::string_view request_id);
  // Deletes ended jobs after their purge_time, and uploads that nothing was added to since
  // `uploads_before`. How many are gone. Their rows, and those of jobs that other calls removed,
  // are deleted in small transactions, a bounded number each time: it is to be called every minute
  // or so. The files do not shrink; their space is used again.
  absl::StatusOr<int64_t> Purge(absl::Time uploads_before);

  // ---- items ----

  // Items without a result, in order, from `first_index`; at most `limit`, and no more than about
  // `max_bytes` of requests, but at least one if there is one.
  absl::StatusOr<std::vector<PendingItem>> ReadPending(JobId job, int64_t first_index, int limit,
                                                       int64_t max_bytes) const;
  // The three below pass over what is of a job that is gone. INVALID_ARGUMENT, and nothing of that
  // call is done, when the job never had such an item.

  // Before the items run: then a crash counts as an attempt of theirs. A QUEUED job is IN_PROGRESS
  // with it. Of an item with a result, a start changes nothing.
  void StartItems(std::vector<ItemStart> starts, Done done);
  // Takes a start back that was nobody's fault (drain, recovery of the group); `attempts` is as
  // before it.
  void ReturnItems(std::vector<ItemStart> starts, Done done);
  // Ends items. A second end of an item changes nothing. The job that has none left without a
  // result goes to FINALIZING, to end COMPLETED. Ends come late, too: while the job is FINALIZING
  // or CANCELLING they count as before.
  void EndItems(std::vector<ItemEnd> ends, Done done);

  // Results in the order of their commits after `after` (0: from the start); a result's place in
  // that order is its `sequence`. At most `limit`, and about `max_bytes`, but one if there is one.
  struct Result {
    int64_t sequence = 0;
    v1::ItemResult result;
  };
  absl::StatusOr<std::vector<Result>> ReadResults(JobId job, int64_t after, int limit,
                                                  int64_t max_bytes) const;

 private:
  class Impl;
  explicit BatchStore(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_STORE_H_
