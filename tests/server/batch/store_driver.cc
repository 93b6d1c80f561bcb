#include "tests/server/batch/store_driver.h"

#include <algorithm>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/status.h"

namespace latentd {
namespace {

// `point` as it is when the store was opened so often there. A retry is two transactions: when the
// second is missing, the operation is asked for again, by a model that knows nothing of the first.
std::optional<StorePoint> Match(StorePoint point, const StoreOp& next, int max_reopened,
                                const std::string& described) {
  StoreModel half = point.model;
  const bool is_retry =
      next.kind == StoreOp::kRetry && half.BeginRetry(next) == absl::StatusCode::kOk;
  for (point.num_reopened = 0; point.num_reopened <= max_reopened; ++point.num_reopened) {
    if (point.model.Describe() == described || (is_retry && half.Describe() == described)) {
      return point;
    }
    point.model.Reopen();
    half.Reopen();
  }
  return std::nullopt;
}

}  // namespace

StoreOp OpAt(uint64_t seed, const StorePoint& point) {
  std::seed_seq sequence{seed, static_cast<uint64_t>(point.num_ops)};
  std::mt19937_64 random(sequence);
  return point.model.MakeOp(&random);
}

std::optional<StorePoint> FindPoint(uint64_t seed, const StorePoint& from, int64_t num_known,
                                    int64_t max_ops, int max_reopened,
                                    const std::string& described) {
  StorePoint point = from;
  while (true) {
    const StoreOp op = OpAt(seed, point);
    if (point.num_ops >= num_known) {
      std::optional<StorePoint> found = Match(point, op, max_reopened, described);
      if (found.has_value()) return found;
    }
    if (point.num_ops >= max_ops) return std::nullopt;
    point.model.Apply(op);
    ++point.num_ops;
  }
}

StoreDriver::StoreDriver(uint64_t seed, StorePoint from, std::function<void(int64_t)> on_known)
    : seed_(seed),
      on_known_(std::move(on_known)),
      point_(std::move(from)),
      now_(point_.model.now()),
      num_known_(point_.num_ops) {}

absl::Time StoreDriver::now() const {
  absl::MutexLock lock(&mutex_);
  return now_;
}

int64_t StoreDriver::num_known() const {
  absl::MutexLock lock(&mutex_);
  return num_known_;
}

bool StoreDriver::has_failed() const {
  absl::MutexLock lock(&mutex_);
  return failed_;
}

std::vector<std::string> StoreDriver::wrong() const {
  absl::MutexLock lock(&mutex_);
  return wrong_;
}

void StoreDriver::Run(int64_t num_ops, BatchStore* store) {
  for (int64_t i = 0; i < num_ops; ++i) {
    const StoreOp op = OpAt(seed_, point_);
    const int64_t index = point_.num_ops;
    int limit = WantsAnswers(op) ? 0 : kMaxOnTheWay - 1;
    {
      absl::MutexLock lock(&mutex_);
      const auto may_go = [&]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
        return on_the_way_ <= limit;
      };
      mutex_.Await(absl::Condition(&may_go));
      if (failed_) break;  // what only reads could still be answered
      ++on_the_way_;
    }
    const absl::StatusCode expected = point_.model.Apply(op);
    ++point_.num_ops;
    {
      absl::MutexLock lock(&mutex_);
      now_ = point_.model.now();
    }
    Ask(op, point_.model.now(), store,
        [this, index, expected](const absl::Status& status) { OnAnswer(index, expected, status); });
  }
  absl::MutexLock lock(&mutex_);
  const auto all = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return on_the_way_ == 0; };
  mutex_.Await(absl::Condition(&all));
}

void StoreDriver::OnAnswer(int64_t index, absl::StatusCode expected, const absl::Status& status) {
  int64_t num_known = 0;
  {
    absl::MutexLock lock(&mutex_);
    if (absl::IsUnavailable(status)) {
      failed_ = true;
      if (ErrorReason(status) != "STORE_FAILED") wrong_.push_back(status.ToString());
    } else if (status.code() != expected) {
      wrong_.push_back(absl::StrCat("operation ", index, ": ", status.ToString(), ", not ",
                                    absl::StatusCodeToString(expected)));
    } else if (status.ok()) {
      // What is refused says nothing of those before it, whose commit may fail.
      if (failed_) wrong_.push_back(absl::StrCat("operation ", index, " after a failure"));
      num_known_ = std::max(num_known_, index + 1);
      num_known = num_known_;
    }
  }
  if (num_known > 0 && on_known_) on_known_(num_known);
  absl::MutexLock lock(&mutex_);
  --on_the_way_;
}

}  // namespace latentd
