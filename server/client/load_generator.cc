#include "server/client/load_generator.h"

#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>
#include <thread>
#include <unordered_set>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "engine/status.h"
#include "server/client/event_scan.h"

namespace latentd {
namespace {

using Clock = std::chrono::steady_clock;

constexpr std::chrono::seconds kConnectTimeout{10};

float MillisecondsBetween(Clock::time_point begin, Clock::time_point end) {
  return std::chrono::duration<float, std::milli>(end - begin).count();
}

Clock::duration Seconds(double seconds) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

// Of this process, all threads: user and system.
std::pair<double, double> CpuSeconds() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  const auto seconds = [](const timeval& time) {
    return static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_usec);
  };
  return {seconds(usage.ru_utime), seconds(usage.ru_stime)};
}

// What all workers of a run share. Closed loop: a worker takes the next request when one ends.
struct RunState {
  LoadGenerator::Plan plan;
  Clock::time_point begin;
  Clock::time_point send_end;  // no request is due after it
  std::atomic<int64_t> next = 0;
  std::atomic<bool> stop = false;  // Ctrl-C

  // The next request's number within the plan; none when the plan is through.
  std::optional<int64_t> Take() {
    if (stop.load(std::memory_order_relaxed) || Clock::now() >= send_end) return std::nullopt;
    const int64_t number = next.fetch_add(1, std::memory_order_relaxed);
    if (plan.num_requests > 0 && number >= plan.num_requests) return std::nullopt;
    return number;
  }
};

// One request under way. Has at most one operation in the completion queue, so its address is the
// tag.
struct Call {
  enum class State { kSending, kReading, kFinishing };

  grpc::ClientContext context;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream;
  std::unique_ptr<grpc::GenericClientAsyncResponseReader> unary;
  // Stored with release by the thread that sends and read with acquire by the queue's: what the
  // sender wrote is seen without a look into gRPC's own locks.
  std::atomic<State> state = State::kSending;
  grpc::ByteBuffer buffer;
  grpc::Status status;
  Clock::time_point due, first, last;  // first and last delta
  int64_t output_tokens = 0;           // asked for; 0: open
  int64_t num_deltas = 0;
  bool finished = false;   // the event came
  bool malformed = false;  // a message was no GenerationEvent
  std::optional<v1::Usage> usage;
};

}  // namespace

class LoadGenerator::Worker {
 public:
  Worker(const BenchOptions& options, const Workload& workload, int64_t num_connections)
      : options_(options), workload_(workload) {
    for (int64_t i = 0; i < num_connections; ++i) {
      channels_.push_back(MakeChannel(options.connection));
      stubs_.push_back(std::make_unique<grpc::GenericStub>(channels_.back()));
    }
  }

  // Opens the connections, so that no request's latency holds that. One that cannot be had by
  // `deadline` is left to the requests, which tell why.
  void Connect(std::chrono::system_clock::time_point deadline) {
    for (const auto& channel : channels_) channel->GetState(/*try_to_connect=*/true);
    for (const auto& channel : channels_) channel->WaitForConnected(deadline);
  }

  // Begins a run. Until Join() the thread handles what the queue gives.
  void Begin(RunState* run) {
    run_ = run;
    result_ = LoadResult();
    last_end_ = Clock::now();
    queue_ = std::make_unique<grpc::CompletionQueue>();
    thread_ = std::thread([this] { Loop(); });
  }

  // Sends a request. From any thread between Begin() and End().
  void Send(int64_t number, Clock::time_point due) {
    auto call = std::make_unique<Call>();
    Workload::Item item = workload_.At(run_->plan.first_index + number);
    call->due = due;
    call->output_tokens = item.output_tokens;
    call->context.set_deadline(std::chrono::system_clock::now() + Seconds(options_.timeout_s));
    grpc::GenericStub& stub = *stubs_[next_stub_.fetch_add(1) % stubs_.size()];
    if (options_.unary) {
      call->unary =
          stub.PrepareUnaryCall(&call->context, workload_.method(), item.request, queue_.get());
    } else {
      // Headers, request and half-close go out together.
      call->context.set_initial_metadata_corked(true);
      call->stream = stub.PrepareCall(&call->context, workload_.method(), queue_.get());
    }
    Call* tag = call.release();
    const float lag = MillisecondsBetween(due, Clock::now());
    {
      absl::MutexLock lock(&mutex_);
      calls_.insert(tag);
      send_lag_ms_.push_back(lag);
      max_in_flight_ = std::max(max_in_flight_, calls_.size());
      num_sent.fetch_add(1, std::memory_order_relaxed);
      // Under the lock: a call that can be found can be cancelled.
      if (options_.unary) {
        tag->unary->StartCall();
        tag->state.store(Call::State::kFinishing, std::memory_order_release);
        tag->unary->Finish(&tag->buffer, &tag->status, tag);
      } else {
        tag->stream->StartCall(nullptr);
        tag->state.store(Call::State::kSending, std::memory_order_release);
        tag->stream->WriteLast(item.request, grpc::WriteOptions(), tag);
      }
    }
  }

  void CancelAll() {
    absl::MutexLock lock(&mutex_);
    for (Call* call : calls_) call->context.TryCancel();
  }

  // After the last call has ended: gives what was measured.
  LoadResult End() {
    queue_->Shutdown();
    thread_.join();
    queue_.reset();
    absl::MutexLock lock(&mutex_);
    LATENTD_CHECK(calls_.empty());
    result_.duration_s = std::chrono::duration<double>(last_end_ - run_->begin).count();
    result_.num_sent = num_sent.exchange(0);
    result_.num_deltas = num_deltas.exchange(0);
    result_.send_lag_ms = std::exchange(send_lag_ms_, {});
    result_.max_in_flight = static_cast<int64_t>(std::exchange(max_in_flight_, 0));
    num_completed = num_failed = num_ended = 0;
    return std::move(result_);
  }

  // Read by the thread that shows progress.
  std::atomic<int64_t> num_sent = 0, num_completed = 0, num_failed = 0, num_ended = 0,
                       num_deltas = 0;

 private:
  void Loop() {
    void* tag = nullptr;
    bool ok = false;
    while (queue_->Next(&tag, &ok)) Advance(static_cast<Call*>(tag), ok);
  }

  void Advance(Call* call, bool ok) {
    const Call::State state = call->state.load(std::memory_order_acquire);
    if (state == Call::State::kFinishing) {
      End(call);
      return;
    }
    if (ok && state == Call::State::kReading) ok = Receive(*call);
    if (ok) {
      call->state.store(Call::State::kReading, std::memory_order_relaxed);
      call->stream->Read(&call->buffer, call);
    } else {
      call->state.store(Call::State::kFinishing, std::memory_order_relaxed);
      call->stream->Finish(&call->status, call);
    }
  }

  // One message of a stream; false when it is none that we know, which ends the call.
  bool Receive(Call& call) {
    const std::optional<ScannedEvent> event = ScanEvent(call.buffer);
    if (!event) {
      call.malformed = true;
      call.context.TryCancel();
      return false;
    }
    if (event->kind == ScannedEvent::Kind::kDelta) {
      const Clock::time_point now = Clock::now();
      if (call.num_deltas++ == 0) {
        call.first = now;
        result_.ttft_ms.push_back(MillisecondsBetween(call.due, now));
      } else {
        result_.itl_ms.push_back(MillisecondsBetween(call.last, now));
      }
      call.last = now;
      result_.num_counted_tokens += event->num_token_ids;
      result_.num_single_token_deltas += event->num_token_ids == 1;
      num_deltas.store(num_deltas.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
    }
    call.finished |= event->kind == ScannedEvent::Kind::kFinished;
    if (event->usage) call.usage = event->usage;
    return true;
  }

  void End(Call* call) {
    Account(*call);
    {
      absl::MutexLock lock(&mutex_);
      calls_.erase(call);
    }
    delete call;
    if (run_->plan.concurrency > 0) {
      if (const auto number = run_->Take()) Send(*number, Clock::now());
    }
    // Last: when all that were sent have ended, nobody sends any more.
    num_ended.fetch_add(1, std::memory_order_release);
  }

  void Account(Call& call) {
    const Clock::time_point now = Clock::now();
    last_end_ = now;
    if (call.malformed) {
      AddError("MALFORMED_EVENT", "the stream holds a message that is no GenerationEvent");
      return;
    }
    if (options_.unary && call.status.ok()) TakeUsage(call);
    if (!call.status.ok()) {
      if (run_->stop && call.status.error_code() == grpc::StatusCode::CANCELLED) {
        ++result_.num_cancelled;
      } else {
        AddError(CodeName(call.status.error_code()), DescribeError(call.status));
      }
      return;
    }
    if (!call.finished || !call.usage) {
      AddError("INCOMPLETE_STREAM", "the stream ended with OK before finish reason and usage");
      return;
    }
    ++result_.num_completed;
    num_completed.fetch_add(1, std::memory_order_relaxed);
    const v1::Usage& usage = *call.usage;
    result_.prompt_tokens += usage.prompt_tokens();
    result_.cached_tokens += usage.cached_tokens();
    result_.completion_tokens += usage.completion_tokens();
    result_.reasoning_tokens += usage.reasoning_tokens();
    result_.num_short += usage.completion_tokens() < call.output_tokens;
    result_.e2e_ms.push_back(MillisecondsBetween(call.due, now));
    if (call.num_deltas > 1 && usage.completion_tokens() > 1) {
      result_.tpot_ms.push_back(MillisecondsBetween(call.first, call.last) /
                                static_cast<float>(usage.completion_tokens() - 1));
    }
  }

  // ChatResponse and CompleteResponse keep their usage in the same place.
  static void TakeUsage(Call& call) {
    static_assert(int{v1::ChatResponse::kUsageFieldNumber} ==
                  int{v1::CompleteResponse::kUsageFieldNumber});
    grpc::Slice slice;
    v1::ChatResponse response;
    if (call.buffer.DumpToSingleSlice(&slice).ok() &&
        response.ParsePartialFromArray(slice.begin(), static_cast<int>(slice.size())) &&
        response.has_usage()) {
      call.usage = response.usage();
      call.finished = true;
    }
  }

  void AddError(const std::string& code, const std::string& message) {
    LoadResult::Error& error = result_.errors[code];
    if (error.count++ == 0) error.message = message;
    num_failed.fetch_add(1, std::memory_order_relaxed);
  }

  const BenchOptions& options_;
  const Workload& workload_;
  std::vector<std::shared_ptr<grpc::Channel>> channels_;   // one connection each
  std::vector<std::unique_ptr<grpc::GenericStub>> stubs_;  // of the channels, used in turn
  std::atomic<size_t> next_stub_ = 0;

  RunState* run_ = nullptr;
  std::unique_ptr<grpc::CompletionQueue> queue_;
  std::thread thread_;
  LoadResult result_;           // written by thread_ alone, as is the next
  Clock::time_point last_end_;  // of a call

  absl::Mutex mutex_;
  std::unordered_set<Call*> calls_ ABSL_GUARDED_BY(mutex_);
  std::vector<float> send_lag_ms_ ABSL_GUARDED_BY(mutex_);
  size_t max_in_flight_ ABSL_GUARDED_BY(mutex_) = 0;
};

namespace {

void Append(std::vector<float> from, std::vector<float>* to) {
  if (to->empty()) {
    *to = std::move(from);
  } else {
    to->insert(to->end(), from.begin(), from.end());
  }
}

void Merge(LoadResult from, LoadResult* to) {
  to->num_sent += from.num_sent;
  to->num_completed += from.num_completed;
  to->num_cancelled += from.num_cancelled;
  to->num_short += from.num_short;
  for (auto& [code, error] : from.errors) {
    LoadResult::Error& sum = to->errors[code];
    if (sum.count == 0) sum.message = std::move(error.message);
    sum.count += error.count;
  }
  to->prompt_tokens += from.prompt_tokens;
  to->cached_tokens += from.cached_tokens;
  to->completion_tokens += from.completion_tokens;
  to->reasoning_tokens += from.reasoning_tokens;
  to->num_deltas += from.num_deltas;
  to->num_single_token_deltas += from.num_single_token_deltas;
  to->num_counted_tokens += from.num_counted_tokens;
  to->max_in_flight += from.max_in_flight;
  to->duration_s = std::max(to->duration_s, from.duration_s);
  Append(std::move(from.ttft_ms), &to->ttft_ms);
  Append(std::move(from.itl_ms), &to->itl_ms);
  Append(std::move(from.tpot_ms), &to->tpot_ms);
  Append(std::move(from.e2e_ms), &to->e2e_ms);
  Append(std::move(from.send_lag_ms), &to->send_lag_ms);
}

}  // namespace

int64_t LoadResult::num_failed() const {
  int64_t sum = 0;
  for (const auto& [code, error] : errors) sum += error.count;
  return sum;
}

LoadGenerator::LoadGenerator(const BenchOptions& options, const Workload& workload,
                             const Interrupts& interrupts)
    : options_(options), workload_(workload), interrupts_(interrupts) {
  for (int64_t i = 0; i < options.threads; ++i) {
    const int64_t share =
        options.connections / options.threads + (i < options.connections % options.threads ? 1 : 0);
    workers_.push_back(std::make_unique<Worker>(options, workload, share));
  }
}

LoadGenerator::~LoadGenerator() = default;

LoadResult LoadGenerator::Run(const Plan& plan,
                              const std::function<void(const LoadProgress&)>& on_progress) {
  const auto connect_deadline = std::chrono::system_clock::now() + kConnectTimeout;
  for (auto& worker : workers_) worker->Connect(connect_deadline);
  const auto [user_before, system_before] = CpuSeconds();
  RunState run;
  run.plan = plan;
  for (auto& worker : workers_) worker->Begin(&run);
  run.begin = Clock::now();
  run.send_end =
      plan.duration_s > 0 ? run.begin + Seconds(plan.duration_s) : Clock::time_point::max();

  const auto send = [this](int64_t number, Clock::time_point due) {
    workers_[number % workers_.size()]->Send(number, due);
  };
  const auto progress = [this, &run] {
    LoadProgress sum;
    // Ended before sent: so that what is under way never comes out too low.
    int64_t ended = 0;
    for (const auto& worker : workers_) ended += worker->num_ended.load(std::memory_order_acquire);
    for (const auto& worker : workers_) {
      sum.num_sent += worker->num_sent;
      sum.num_completed += worker->num_completed;
      sum.num_failed += worker->num_failed;
      sum.num_deltas += worker->num_deltas;
    }
    sum.num_in_flight = sum.num_sent - ended;
    sum.elapsed_s = std::chrono::duration<double>(Clock::now() - run.begin).count();
    return sum;
  };

  Arrivals arrivals(
      options_.arrivals == "constant" ? Arrivals::Process::kConstant : Arrivals::Process::kPoisson,
      plan.concurrency > 0 ? 1 : plan.request_rate, options_.seed);
  Clock::time_point next_due = run.begin;
  bool sending = true;  // by this thread: all of open loop, the first requests of closed loop
  if (plan.concurrency > 0) {
    for (int64_t i = 0; i < plan.concurrency; ++i) {
      const std::optional<int64_t> number = run.Take();
      if (!number) break;
      send(*number, Clock::now());
    }
    sending = false;
  } else {
    next_due += Seconds(arrivals.Next());
  }

  Clock::time_point next_progress = run.begin + std::chrono::seconds(1);
  while (true) {
    const Clock::time_point now = Clock::now();
    if (sending && now >= next_due) {
      // Due before the end counts, however late the client is.
      const int64_t number = run.next++;
      if (next_due >= run.send_end || (plan.num_requests > 0 && number >= plan.num_requests)) {
        sending = false;
      } else {
        send(number, next_due);
        next_due = run.begin + Seconds(arrivals.Next());
      }
      continue;
    }
    if (now >= next_progress) {
      on_progress(progress());
      next_progress += std::chrono::seconds(1);
    }
    if (!sending && progress().num_in_flight == 0) break;
    Clock::time_point wake = std::min(next_progress, now + std::chrono::milliseconds(5));
    if (sending) wake = std::min(next_due, next_progress);
    const bool interrupted = interrupts_.pending() && !run.stop;
    if (interrupted || (!run.stop && interrupts_.Sleep(absl::FromChrono(wake - now)))) {
      run.stop = true;
      sending = false;
    }
    if (run.stop) {
      // Again each time: a worker may just have sent one more.
      for (auto& worker : workers_) worker->CancelAll();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  LoadResult result;
  for (auto& worker : workers_) Merge(worker->End(), &result);
  const auto [user_after, system_after] = CpuSeconds();
  result.user_cpu_s = user_after - user_before;
  result.system_cpu_s = system_after - system_before;
  return result;
}

}  // namespace latentd
