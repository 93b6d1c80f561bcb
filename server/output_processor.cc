#include "server/output_processor.h"

#include <string>

#include "absl/strings/str_cat.h"
#include "server/status.h"

namespace latentd {
namespace {

// The core says what; who tries again needs to know whether the request may be the reason.
absl::Status Explain(const SequenceEvent& event) {
  if (!absl::IsUnavailable(event.error)) return event.error;
  return MakeError(event.error.code(), event.suspect ? "ENGINE_FAILED" : "ENGINE_UNAVAILABLE",
                   event.error.message());
}

}  // namespace

OutputProcessor::OutputProcessor(std::function<void(RequestId)> cancel, RequestObserver* observer)
    : cancel_(std::move(cancel)), observer_(observer), thread_([this] { Loop(); }) {}

OutputProcessor::~OutputProcessor() {
  {
    absl::MutexLock lock(&mutex_);
    stopping_ = true;
  }
  thread_.join();
}

void OutputProcessor::Add(RequestId id, AnswerSpec spec, std::shared_ptr<AnswerSink> sink,
                          absl::Time arrival, absl::Time queue_deadline, bool observed) {
  Push(AddCommand{id, std::make_unique<Entry>(Entry{.answer = Answer(std::move(spec)),
                                                    .sink = std::move(sink),
                                                    .arrival = arrival,
                                                    .queue_deadline = queue_deadline,
                                                    .observed = observed,
                                                    .progress = {}})});
}

void OutputProcessor::Remove(RequestId id) { Push(RemoveCommand{id}); }

void OutputProcessor::HandleEvents(std::vector<SequenceEvent> events) {
  if (!events.empty()) Push(EventsCommand{absl::Now(), std::move(events)});
}

void OutputProcessor::Push(Command command) {
  absl::MutexLock lock(&mutex_);
  inbox_.push_back(std::move(command));
}

void OutputProcessor::Loop() {
  const auto ready = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    return stopping_ || !inbox_.empty();
  };
  std::vector<Command> commands;
  while (true) {
    const absl::Time wake =
        queue_deadlines_.empty() ? absl::InfiniteFuture() : queue_deadlines_.begin()->first;
    {
      absl::MutexLock lock(&mutex_);
      mutex_.AwaitWithDeadline(absl::Condition(&ready), wake);
      if (stopping_) return;
      commands.swap(inbox_);
    }
    for (Command& command : commands) {
      std::visit([this](auto& one) { Run(std::move(one)); }, command);
    }
    commands.clear();
    if (!queue_deadlines_.empty()) ExpireQueued(absl::Now());
  }
}

void OutputProcessor::Run(AddCommand command) {
  const absl::Time queue_deadline = command.entry->queue_deadline;
  if (queue_deadline != absl::InfiniteFuture()) {
    queue_deadlines_.emplace(queue_deadline, command.id);
  }
  entries_.emplace(command.id, std::move(command.entry));
}

void OutputProcessor::Run(RemoveCommand command) {
  const auto it = entries_.find(command.id);
  if (it != entries_.end()) Erase(it);
}

void OutputProcessor::Erase(Entries::iterator it) {
  ClearQueueDeadline(it->first, it->second.get());
  entries_.erase(it);
}

void OutputProcessor::ClearQueueDeadline(RequestId id, Entry* entry) {
  if (entry->queue_deadline == absl::InfiniteFuture()) return;
  queue_deadlines_.erase({entry->queue_deadline, id});
  entry->queue_deadline = absl::InfiniteFuture();
}

void OutputProcessor::Run(EventsCommand command) {
  for (const SequenceEvent& event : command.events) {
    const auto it = entries_.find(event.id);
    if (it == entries_.end()) continue;  // cancelled while the event was on its way
    Entry* entry = it->second.get();
    switch (event.kind) {
      case SequenceEvent::Kind::kStarted:
        entry->progress.cached_tokens = event.cached_tokens;
        entry->progress.started = command.time;
        ClearQueueDeadline(event.id, entry);
        entry->sink->OnStarted(entry->progress);
        break;
      case SequenceEvent::Kind::kToken:
        HandleToken(it, event, command.time);
        break;
      case SequenceEvent::Kind::kFailed:
        entry->sink->OnFailed(Explain(event));
        Erase(it);
        break;
    }
  }
  FlushObserved();
}

void OutputProcessor::HandleToken(Entries::iterator it, const SequenceEvent& event,
                                  absl::Time now) {
  Entry* entry = it->second.get();
  ObserveToken(entry, now);
  AnswerPiece piece = entry->answer.Push(event.token, event.finish);
  entry->progress.completion_tokens = entry->answer.completion_tokens();
  entry->progress.reasoning_tokens = entry->answer.reasoning_tokens();
  if (!piece.finished) {
    entry->sink->OnPiece(event.token, std::move(piece), entry->progress);
    return;
  }
  // A stop string is text; the core, which knows tokens only, would go on.
  if (event.finish == FinishReason::kNone) cancel_(event.id);
  entry->sink->OnFinished(event.token, std::move(piece), entry->progress, entry->answer);
  Erase(it);
}

void OutputProcessor::ObserveToken(Entry* entry, absl::Time now) {
  AnswerProgress& progress = entry->progress;
  if (progress.completion_tokens == 0) {
    progress.first_token = now;
    if (entry->observed) observer_->OnFirstToken(now - entry->arrival);
  } else if (entry->observed) {
    const absl::Duration gap = now - progress.last_token;
    if (gap != observed_gap_) FlushObserved();
    observed_gap_ = gap;
    ++num_observed_;
  }
  progress.last_token = now;
}

void OutputProcessor::FlushObserved() {
  if (num_observed_ > 0) observer_->OnTokens(observed_gap_, num_observed_);
  num_observed_ = 0;
}

void OutputProcessor::ExpireQueued(absl::Time now) {
  while (!queue_deadlines_.empty() && queue_deadlines_.begin()->first <= now) {
    const RequestId id = queue_deadlines_.begin()->second;
    const auto it = entries_.find(id);
    cancel_(id);
    const std::string waited = absl::FormatDuration(now - it->second->arrival);
    it->second->sink->OnFailed(MakeError(
        absl::StatusCode::kDeadlineExceeded, "QUEUE_TIMEOUT",
        absl::StrCat("the request waited ", waited, " and was not begun"), {{"waited", waited}}));
    Erase(it);
  }
}

}  // namespace latentd
