#ifndef LATENTD_SERVER_OUTPUT_PROCESSOR_H_
#define LATENTD_SERVER_OUTPUT_PROCESSOR_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "engine/step.h"
#include "scheduler/request.h"
#include "server/answer.h"
#include "server/request_observer.h"

namespace latentd {

// How far an answer has come.
struct AnswerProgress {
  int32_t cached_tokens = 0;
  int32_t completion_tokens = 0;
  int32_t reasoning_tokens = 0;
  // InfiniteFuture: not yet.
  absl::Time started = absl::InfiniteFuture();
  absl::Time first_token = absl::InfiniteFuture();
  absl::Time last_token = absl::InfiniteFuture();
};

// Where an answer goes. Called by the output thread alone, in order: OnStarted, OnPiece ..., with
// the last piece OnFinished instead; or OnFailed at any time. Must not block.
class AnswerSink {
 public:
  virtual ~AnswerSink() = default;

  virtual void OnStarted(const AnswerProgress& progress) = 0;
  // Possibly without text: a token may complete none.
  virtual void OnPiece(TokenId token, AnswerPiece piece, const AnswerProgress& progress) = 0;
  // The last token and piece; `answer` knows how it ended.
  virtual void OnFinished(TokenId token, AnswerPiece piece, const AnswerProgress& progress,
                          const Answer& answer) = 0;
  // The core failed it, or it waited too long.
  virtual void OnFailed(const absl::Status& status) = 0;
};

// The output thread: turns the core's events into text and hands it to each request's sink. It owns
// the answers; everything reaches it through one queue, in order. Thread-safe.
class OutputProcessor {
 public:
  // `cancel` ends a request in the core: a stop string has matched, or it waited too long.
  // `observer` must outlive the processor.
  OutputProcessor(std::function<void(RequestId)> cancel, RequestObserver* observer);
  ~OutputProcessor();  // ends the thread; what is open is dropped

  // Before the request is submitted to the core. When it has not started at `queue_deadline` it
  // fails with DEADLINE_EXCEEDED. The observer hears of its tokens if it is `observed`.
  void Add(RequestId id, AnswerSpec spec, std::shared_ptr<AnswerSink> sink, absl::Time arrival,
           absl::Time queue_deadline, bool observed);
  // Drops it: the sink hears no more of it. No-op when it has ended.
  void Remove(RequestId id);
  // What the core reports. Never blocks.
  void HandleEvents(std::vector<SequenceEvent> events);

 private:
  struct Entry {
    Answer answer;
    std::shared_ptr<AnswerSink> sink;
    absl::Time arrival;
    absl::Time queue_deadline;  // InfiniteFuture: none, or no longer
    bool observed;
    AnswerProgress progress;
  };
  struct AddCommand {
    RequestId id;
    std::unique_ptr<Entry> entry;
  };
  struct RemoveCommand {
    RequestId id;
  };
  struct EventsCommand {
    absl::Time time;
    std::vector<SequenceEvent> events;
  };
  using Command = std::variant<AddCommand, RemoveCommand, EventsCommand>;

  void Push(Command command);
  void Loop();
  // The rest runs on the output thread.
  void Run(AddCommand command);
  void Run(RemoveCommand command);
  void Run(EventsCommand command);
  using Entries = absl::flat_hash_map<RequestId, std::unique_ptr<Entry>>;
  void Erase(Entries::iterator it);
  // It waits no more.
  void ClearQueueDeadline(RequestId id, Entry* entry);
  void HandleToken(Entries::iterator it, const SequenceEvent& event, absl::Time now);
  void ObserveToken(Entry* entry, absl::Time now);
  void FlushObserved();
  void ExpireQueued(absl::Time now);

  const std::function<void(RequestId)> cancel_;
  RequestObserver* const observer_;

  absl::Mutex mutex_;
  std::vector<Command> inbox_ ABSL_GUARDED_BY(mutex_);
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;

  Entries entries_;
  absl::btree_set<std::pair<absl::Time, RequestId>> queue_deadlines_;  // of those that wait
  // Tokens of this step that waited equally long, told together.
  absl::Duration observed_gap_;
  int64_t num_observed_ = 0;

  std::thread thread_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_OUTPUT_PROCESSOR_H_
