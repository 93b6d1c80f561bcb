#include "server/batch/change_hub.h"

#include <utility>

namespace latentd {
namespace {

void DropExpired(std::vector<std::weak_ptr<ChangeListener>>* listeners) {
  std::erase_if(*listeners, [](const auto& listener) { return listener.expired(); });
}

}  // namespace

void ChangeHub::Subscribe(JobId job, std::weak_ptr<ChangeListener> listener) {
  absl::MutexLock lock(&mutex_);
  // Jobs that nobody watches any more may never change again: here is where they are forgotten.
  if (listeners_.size() > 2 * num_kept_) {
    absl::erase_if(listeners_, [](auto& entry) {
      DropExpired(&entry.second);
      return entry.second.empty();
    });
    num_kept_ = listeners_.size();
  }
  auto& list = listeners_[job];
  DropExpired(&list);
  list.push_back(std::move(listener));
}

void ChangeHub::Notify(const std::vector<JobId>& jobs) {
  std::vector<std::shared_ptr<ChangeListener>> told;
  {
    absl::MutexLock lock(&mutex_);
    for (const JobId job : jobs) {
      const auto found = listeners_.find(job);
      if (found == listeners_.end()) continue;
      for (const auto& listener : found->second) {
        if (auto live = listener.lock()) told.push_back(std::move(live));
      }
    }
  }
  for (const auto& listener : told) listener->OnJobChanged();
}

}  // namespace latentd
