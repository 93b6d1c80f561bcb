#include "server/batch/item_queue.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "engine/status.h"

namespace latentd {
namespace {

constexpr int32_t kDefaultMaxAttempts = 5;

absl::Time ToTime(const google::protobuf::Timestamp& time) {
  return absl::FromUnixSeconds(time.seconds()) + absl::Nanoseconds(time.nanos());
}

int64_t SizeOf(const PendingItem& item) { return static_cast<int64_t>(item.request.size()); }

}  // namespace

ItemQueue::ItemQueue(const BatchStore* store, int32_t max_ahead, int64_t max_ahead_bytes)
    : store_(store), max_ahead_(max_ahead), max_ahead_bytes_(max_ahead_bytes) {}

void ItemQueue::Update(const JobRecord& record) {
  const v1::Job& job = record.job;
  if (job.state() < v1::JOB_STATE_QUEUED || job.state() > v1::JOB_STATE_CANCELLING) {
    Remove(record.id);
    return;
  }
  Entry& entry = entries_[record.id];
  entry.job.id = record.id;
  entry.job.priority = job.spec().priority();
  entry.job.max_attempts = job.spec().has_max_attempts_per_item()
                               ? job.spec().max_attempts_per_item()
                               : kDefaultMaxAttempts;
  entry.job.fail_fast = job.spec().fail_fast();
  if (job.has_expire_time()) entry.job.expire_time = ToTime(job.expire_time());
  entry.job.ending = job.state() > v1::JOB_STATE_IN_PROGRESS;
  if (entry.job.ending) DropAhead(&entry);
}

void ItemQueue::Remove(JobId id) {
  const auto it = entries_.find(id);
  if (it == entries_.end()) return;
  DropAhead(&it->second);
  entries_.erase(it);
}

ActiveJob* ItemQueue::Find(JobId id) {
  const auto it = entries_.find(id);
  return it == entries_.end() ? nullptr : &it->second.job;
}

std::vector<ActiveJob*> ItemQueue::jobs() {
  std::vector<ActiveJob*> jobs;
  for (auto& [id, entry] : entries_) jobs.push_back(&entry.job);
  return jobs;
}

absl::StatusOr<std::optional<ItemQueue::Next>> ItemQueue::Take() {
  while (Entry* entry = Choose()) {
    if (entry->ahead.empty()) RETURN_IF_ERROR(ReadAhead(entry));
    if (entry->ahead.empty()) continue;  // it has no more
    Next next{.job = &entry->job, .item = std::move(entry->ahead.front())};
    entry->ahead.pop_front();
    ahead_bytes_ -= SizeOf(next.item);
    entry->last_taken = ++num_taken_;
    return next;
  }
  return std::nullopt;
}

// Of the highest priority the one that holds the fewest places; of these, the one that has waited
// longest.
ItemQueue::Entry* ItemQueue::Choose() {
  Entry* best = nullptr;
  const auto rank = [](const Entry& entry) {
    return std::tuple(-int64_t{entry.job.priority}, entry.job.num_held, entry.last_taken);
  };
  for (auto& [id, entry] : entries_) {
    if (entry.job.ending || (entry.ahead.empty() && entry.read_whole)) continue;
    if (best == nullptr || rank(entry) < rank(*best)) best = &entry;
  }
  return best;
}

absl::Status ItemQueue::ReadAhead(Entry* entry) {
  const int64_t share = max_ahead_bytes_ / std::max<int64_t>(std::ssize(entries_), 1);
  auto items = store_->ReadPending(entry->job.id, entry->next_index, max_ahead_,
                                   std::max<int64_t>(share, 1));
  const bool gone = absl::IsNotFound(items.status());
  if (!gone) RETURN_IF_ERROR(items.status());
  if (gone || items->empty()) {
    entry->read_whole = true;
    return absl::OkStatus();
  }
  entry->next_index = items->back().index + 1;
  for (PendingItem& item : *items) {
    ahead_bytes_ += SizeOf(item);
    entry->ahead.push_back(std::move(item));
  }
  return absl::OkStatus();
}

void ItemQueue::DropAhead(Entry* entry) {
  for (const PendingItem& item : entry->ahead) ahead_bytes_ -= SizeOf(item);
  entry->ahead.clear();
  entry->read_whole = true;
}

}  // namespace latentd
