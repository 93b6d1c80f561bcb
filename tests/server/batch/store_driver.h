#ifndef LATENTD_TESTS_SERVER_BATCH_STORE_DRIVER_H_
#define LATENTD_TESTS_SERVER_BATCH_STORE_DRIVER_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/batch/batch_store.h"
#include "tests/server/batch/store_model.h"

namespace latentd {

// A state of a store: that of the model after the first `num_ops` of the operations that a seed
// makes.
struct StorePoint {
  StoreModel model;
  int64_t num_ops = 0;
  int num_reopened = 0;  // at that point, as FindPoint() found
};

// The next operation at that point; the same each time.
StoreOp OpAt(uint64_t seed, const StorePoint& point);

// Which point a store is at that was at `from`, or later, when `num_known` operations were known to
// be committed and no more than `max_ops` had been asked for; and that was opened since, up to
// `max_reopened` times. Nothing: none, so it lost something, or has a part of something.
std::optional<StorePoint> FindPoint(uint64_t seed, const StorePoint& from, int64_t num_known,
                                    int64_t max_ops, int max_reopened,
                                    const std::string& described);

// Asks a store for a seed's operations, from a point on, with several on the way at a time.
class StoreDriver {
 public:
  // `on_known(n)`: the first n operations are committed; may be empty. By the store's thread.
  StoreDriver(uint64_t seed, StorePoint from, std::function<void(int64_t)> on_known);

  // The clock of the store.
  absl::Time now() const ABSL_LOCKS_EXCLUDED(mutex_);

  // Until so many operations were asked for, or one was UNAVAILABLE. Then all are answered.
  void Run(int64_t num_ops, BatchStore* store) ABSL_LOCKS_EXCLUDED(mutex_);

  // So many are known to be committed, so many were asked for.
  int64_t num_known() const ABSL_LOCKS_EXCLUDED(mutex_);
  int64_t num_asked() const { return point_.num_ops; }
  bool has_failed() const ABSL_LOCKS_EXCLUDED(mutex_);
  // Answers that were others than the model's, or came after a failure without being one.
  std::vector<std::string> wrong() const ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  void OnAnswer(int64_t index, absl::StatusCode expected, const absl::Status& status)
      ABSL_LOCKS_EXCLUDED(mutex_);

  const uint64_t seed_;
  const std::function<void(int64_t)> on_known_;
  StorePoint point_;
  mutable absl::Mutex mutex_;
  absl::Time now_ ABSL_GUARDED_BY(mutex_);
  int on_the_way_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t num_known_ ABSL_GUARDED_BY(mutex_) = 0;
  bool failed_ ABSL_GUARDED_BY(mutex_) = false;
  std::vector<std::string> wrong_ ABSL_GUARDED_BY(mutex_);
};

// That StoreDriver has on the way at most.
inline constexpr int kMaxOnTheWay = 24;

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_BATCH_STORE_DRIVER_H_
