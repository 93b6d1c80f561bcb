#include "tests/server/cluster/fake_member.h"

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/status.h"

namespace latentd {
namespace {

Fault Take(int32_t rank, std::multimap<int32_t, Fault>* faults) {
  const auto found = faults->find(rank);
  if (found == faults->end()) return Fault::kNone;
  const Fault fault = found->second;
  faults->erase(found);
  return fault;
}

}  // namespace

void FakeFabric::InjectInStep(int32_t rank, Fault fault, int times) {
  absl::MutexLock lock(&mutex_);
  for (int i = 0; i < times; ++i) step_faults_.emplace(rank, fault);
}

void FakeFabric::InjectInJoin(int32_t rank, Fault fault) {
  absl::MutexLock lock(&mutex_);
  join_faults_.emplace(rank, fault);
}

Fault FakeFabric::TakeStepFault(int32_t rank) {
  absl::MutexLock lock(&mutex_);
  return Take(rank, &step_faults_);
}

Fault FakeFabric::TakeJoinFault(int32_t rank) {
  absl::MutexLock lock(&mutex_);
  return Take(rank, &join_faults_);
}

absl::Status FakeFabric::Meet(int64_t epoch, int64_t meeting, const std::atomic<bool>& aborted,
                              absl::Time deadline) {
  absl::MutexLock lock(&mutex_);
  int32_t& present = present_[{epoch, meeting}];
  ++present;
  const auto all = [&] { return present >= world_size_ || aborted; };
  while (!all() && absl::Now() < deadline) {
    mutex_.AwaitWithTimeout(absl::Condition(&all), absl::Milliseconds(2));
  }
  if (aborted) return absl::UnavailableError(absl::StrCat("meeting ", meeting, " was aborted"));
  if (present < world_size_) return absl::DeadlineExceededError("ranks did not come");
  return absl::OkStatus();
}

FakeMember::FakeMember(Options options) : options_(std::move(options)) {
  ++options_.fabric->num_loads;
}

absl::Status FakeMember::Meet(absl::Time deadline) {
  waiting_ = true;
  const absl::Status status = options_.fabric->Meet(epoch_, meeting_++, aborted_, deadline);
  waiting_ = false;
  if (!status.ok()) epoch_ = 0;
  return status;
}

absl::Status FakeMember::Join(const GroupSpec& group, absl::Time deadline) {
  aborted_ = false;
  epoch_ = group.epoch;
  meeting_ = 0;
  FakeEngineOptions engine = options_.engine;
  engine.failure_seed = static_cast<uint64_t>(group.epoch * 1000 + group.rank);
  engine_ = std::make_unique<FakeEngine>(engine);
  RETURN_IF_ERROR(Suffer(options_.fabric->TakeJoinFault(options_.rank)));
  return Meet(deadline);
}

absl::StatusOr<StepResult> FakeMember::Execute(const StepPlan& plan) {
  if (epoch_ == 0) return absl::FailedPreconditionError("in no group");
  const Fault fault = options_.fabric->TakeStepFault(options_.rank);
  RETURN_IF_ERROR(Suffer(fault));
  RETURN_IF_ERROR(Meet(absl::InfiniteFuture()));
  absl::SleepFor(options_.step_time);
  StepResult result;
  if (!plan.empty()) {
    ASSIGN_OR_RETURN(result, engine_->Execute(plan));
  }
  RETURN_IF_ERROR(Meet(absl::InfiniteFuture()));
  if (fault == Fault::kFewTokens) result.sampled.resize(result.sampled.size() + 1);
  if (fault == Fault::kBadToken) {
    if (result.sampled.empty()) result.sampled.resize(1);
    result.sampled.back() = -5;
  }
  return result;
}

absl::Status FakeMember::Suffer(Fault fault) {
  const auto wait = [this](bool listen) {
    while (!(listen && aborted_) && !*options_.killed) absl::SleepFor(absl::Milliseconds(1));
  };
  switch (fault) {
    case Fault::kNone:
    case Fault::kFewTokens:
    case Fault::kBadToken:
      return absl::OkStatus();
    case Fault::kDie:
      options_.die();
      wait(/*listen=*/true);
      return absl::UnavailableError("dead");
    case Fault::kError:
      epoch_ = 0;
      return absl::UnavailableError("injected error");
    case Fault::kOwnError:
      epoch_ = 0;
      return absl::InternalError("injected error of its own");
    case Fault::kHang:
      wait(/*listen=*/true);
      epoch_ = 0;
      return absl::UnavailableError("aborted");
    case Fault::kHangForEver:
      wait(/*listen=*/false);
      return absl::UnavailableError("killed");
    case Fault::kLost:
      lost_ = true;
      return absl::InternalError("injected loss of the engine");
  }
  return absl::OkStatus();
}

}  // namespace latentd
