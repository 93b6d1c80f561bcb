#ifndef LATENTD_SERVER_BATCH_ITEM_QUEUE_H_
#define LATENTD_SERVER_BATCH_ITEM_QUEUE_H_

#include <cstdint>
#include <deque>
#include <map>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"

namespace latentd {

// A job as far as running it goes.
struct ActiveJob {
  JobId id = 0;
  int32_t priority = 0;
  int32_t max_attempts = 5;
  bool fail_fast = false;
  absl::Time expire_time = absl::InfiniteFuture();
  bool ending = false;   // FINALIZING or CANCELLING: nothing of it is begun any more
  int32_t num_held = 0;  // its items that have a place
};

// The jobs that are under way, and which item of theirs is next. Reads from the store a little
// ahead: its memory does not grow with the jobs. Not thread-safe.
class ItemQueue {
 public:
  // At most `max_ahead` items and its share of `max_ahead_bytes` are read ahead of a job.
  ItemQueue(const BatchStore* store, int32_t max_ahead, int64_t max_ahead_bytes);

  // Takes a job in, or what has changed of it. One that has ended is forgotten.
  void Update(const JobRecord& record);
  void Remove(JobId id);
  ActiveJob* Find(JobId id);  // null: not under way
  std::vector<ActiveJob*> jobs();

  struct Next {
    ActiveJob* job;
    PendingItem item;
  };
  // Takes the next item, of the job that README.md says; each is given once. nullopt: there is
  // none.
  absl::StatusOr<std::optional<Next>> Take();

  int64_t ahead_bytes() const { return ahead_bytes_; }

 private:
  struct Entry {
    ActiveJob job;
    std::deque<PendingItem> ahead;
    int64_t next_index = 0;  // from there on nothing was read
    bool read_whole = false;
    int64_t last_taken = 0;
  };

  Entry* Choose();
  absl::Status ReadAhead(Entry* entry);
  void DropAhead(Entry* entry);

  const BatchStore* const store_;
  const int32_t max_ahead_;
  const int64_t max_ahead_bytes_;
  std::map<JobId, Entry> entries_;
  int64_t ahead_bytes_ = 0;
  int64_t num_taken_ = 0;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_ITEM_QUEUE_H_
