// BatchRunner: what becomes of an item that has a place, and which one gets a place next.
#include <algorithm>
#include <string>
#include <utility>
#include <variant>

#include "absl/strings/str_cat.h"
#include "server/batch/batch_runner_impl.h"
#include "server/batch/run_end.h"
#include "server/log.h"
#include "server/status.h"

namespace latentd {
namespace {

// A call of the caller's that runs the item. INVALID_ARGUMENT when it is none.
absl::StatusOr<LocalRequest> RequestOf(const PendingItem& item) {
  v1::BatchItem proto;
  if (proto.ParseFromString(item.request)) {
    if (proto.has_chat()) return LocalRequest(std::move(*proto.mutable_chat()));
    if (proto.has_complete()) return LocalRequest(std::move(*proto.mutable_complete()));
  }
  return MakeError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                   "the item is no BatchItem with a request");
}

}  // namespace

// ---- items -------------------------------------------------------------------------------------

void BatchRunner::Impl::OnStarted(CallId id) {
  const auto it = places_.find(id);
  if (it == places_.end()) return;  // its job ended meanwhile
  Place& place = it->second;
  absl::StatusOr<LocalRequest> request = RequestOf(place.item);
  if (!request.ok()) {
    Fail(place, ToItemError(request.status()));
    Forget(id);
    return;
  }
  place.state = Place::State::kRunning;
  const ActiveJob* job = queue_.Find(place.job);
  caller_->Start(id, *std::move(request), {.priority = job->priority, .seed = place.item.seed},
                 [this, id](absl::StatusOr<LocalResponse> response) {
                   absl::MutexLock lock(&mutex_);
                   inbox_.woken = true;
                   inbox_.ended.emplace_back(id, std::move(response));
                 });
}

void BatchRunner::Impl::OnEnded(CallId id, absl::StatusOr<LocalResponse> response) {
  Place& place = places_.at(id);
  const ActiveJob* job = queue_.Find(place.job);
  if (response.ok()) {
    Succeed(place, *std::move(response));
  } else if (job != nullptr && !job->ending && !stopped_) {
    switch (JudgeRun(response.status())) {
      case RunEnd::kFailed:
        Fail(place, ToItemError(response.status()));
        break;
      case RunEnd::kBad:
        return OnBadEnd(id, *job, response.status());
      case RunEnd::kPostponed:
        Return(&place);
        if (draining_) break;
        pause_until_ = options_.now() + options_.retry_delay;
        return Postpone(id, options_.retry_delay);
    }
  }
  Forget(id);
}

void BatchRunner::Impl::OnBadEnd(CallId id, const ActiveJob& job, const absl::Status& error) {
  Place& place = places_.at(id);
  ++place.item.attempts;
  LogEvent(spdlog::level::warn, "a batch item met with a bad end",
           {{"job", job.id},
            {"index", place.item.index},
            {"attempts", place.item.attempts},
            {"reason", ErrorReason(error)},
            {"error", std::string(error.message())}});
  if (place.item.attempts >= job.max_attempts) {
    Fail(place, AttemptsExhausted(place.item.attempts, error));
    return Forget(id);
  }
  if (draining_) return Forget(id);
  absl::Duration delay = options_.retry_delay;
  for (int i = 1; i < place.item.attempts && delay < options_.max_retry_delay; ++i) delay *= 2;
  Postpone(id, std::min(delay, options_.max_retry_delay));
}

void BatchRunner::Impl::Succeed(const Place& place, LocalResponse response) {
  ItemEnd end{.job = place.job, .result = {}};
  end.result.set_index(place.item.index);
  end.result.set_state(v1::ITEM_STATE_SUCCEEDED);
  std::visit(
      [&end](const auto& proto) {
        end.prompt_tokens = proto.usage().prompt_tokens();
        end.completion_tokens = proto.usage().completion_tokens();
      },
      response);
  if (auto* chat = std::get_if<v1::ChatResponse>(&response)) {
    *end.result.mutable_chat() = std::move(*chat);
  } else {
    *end.result.mutable_complete() = std::move(std::get<v1::CompleteResponse>(response));
  }
  ends_.push_back(std::move(end));
}

void BatchRunner::Impl::Fail(const Place& place, v1::ItemError error) {
  ActiveJob* job = queue_.Find(place.job);
  if (job != nullptr && job->fail_fast && !job->ending) {
    job->ending = true;
    failed_fast_.emplace_back(
        job->id, absl::StrCat("item ", place.item.index, " failed: ", error.message()));
  }
  ItemEnd end{.job = place.job, .result = {}};
  end.result.set_index(place.item.index);
  end.result.set_state(v1::ITEM_STATE_FAILED);
  *end.result.mutable_error() = std::move(error);
  ends_.push_back(std::move(end));
}

void BatchRunner::Impl::Return(Place* place) {
  place->counted = false;  // Write() takes it from the count, once it is written
  returns_.push_back(place->start());
}

void BatchRunner::Impl::LeaveActive(CallId id, Place* place) {
  if (place->state == Place::State::kWaiting) return;
  place->state = Place::State::kWaiting;
  --num_active_;
  if (alone_ == id) alone_ = 0;
  if (std::exchange(place->counted, false)) CountRunning(place->job, -1);
}

void BatchRunner::Impl::Postpone(CallId id, absl::Duration delay) {
  LeaveActive(id, &places_.at(id));
  postponed_.emplace(options_.now() + delay, id);
}

void BatchRunner::Impl::Forget(CallId id) {
  Place& place = places_.at(id);
  LeaveActive(id, &place);
  bytes_ -= place.bytes();
  if (ActiveJob* job = queue_.Find(place.job)) --job->num_held;
  places_.erase(id);
}

// ---- beginning ---------------------------------------------------------------------------------

void BatchRunner::Impl::Begin() {
  const absl::Time now = options_.now();
  for (; !postponed_.empty() && postponed_.begin()->first <= now;
       postponed_.erase(postponed_.begin())) {
    waiting_.push_back(postponed_.begin()->second);
  }
  if (draining_ || stopped_ || now < pause_until_) return;
  const int64_t capacity = caller_->capacity();
  if (capacity == 0) return;
  BeginWaiting();
  BeginNew(options_.max_running > 0 ? options_.max_running : capacity + (capacity + 7) / 8);
}

// In their turn: who runs alone waits for all that run, and all others for it.
void BatchRunner::Impl::BeginWaiting() {
  while (!waiting_.empty() && alone_ == 0) {
    const CallId id = waiting_.front();
    const auto it = places_.find(id);
    if (it != places_.end() && it->second.alone()) {
      if (num_active_ > 0) return;
      alone_ = id;
    }
    waiting_.pop_front();
    if (it != places_.end()) Start(id);
  }
}

void BatchRunner::Impl::BeginNew(int64_t max_places) {
  while (waiting_.empty() && alone_ == 0 && std::ssize(places_) < max_places &&
         (bytes_ == 0 || bytes_ < options_.max_running_bytes)) {
    auto next = queue_.Take();
    if (!Check(next.status()) || !next->has_value()) return;
    ActiveJob* job = (*next)->job;
    Place place{.job = job->id, .item = std::move((*next)->item)};
    if (place.item.attempts >= job->max_attempts) {
      Fail(place, AttemptsExhausted(place.item.attempts, absl::OkStatus()));
      continue;
    }
    while (place.item.seed == 0) place.item.seed = absl::Uniform<uint64_t>(random_);
    ++job->num_held;
    bytes_ += place.bytes();
    const CallId id = ++last_id_;
    places_.emplace(id, std::move(place));
    waiting_.push_back(id);
    BeginWaiting();
  }
}

void BatchRunner::Impl::Start(CallId id) {
  Place& place = places_.at(id);
  place.state = Place::State::kStarting;
  place.counted = true;
  ++num_active_;
  CountRunning(place.job, 1);
  starts_.push_back(place.start());
  starting_.push_back(id);
}

void BatchRunner::Impl::Drain() {
  draining_ = true;
  std::vector<CallId> ids;
  for (const auto& [id, place] : places_) ids.push_back(id);
  for (const CallId id : ids) {
    Place& place = places_.at(id);
    if (place.state == Place::State::kRunning) {
      caller_->Cancel(id);
      continue;
    }
    if (place.state == Place::State::kStarting) Return(&place);
    Forget(id);
  }
}

}  // namespace latentd
