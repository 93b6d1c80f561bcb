#include "tests/server/overhead/load.h"

#include <cstdio>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpcpp/grpcpp.h"
#include "latentd/v1/inference.grpc.pb.h"
#include "tests/server/overhead/clock_engine.h"

namespace latentd {

class Load::Impl {
 public:
  Impl(const std::string& address, int num_streams, int num_connections) {
    for (int i = 0; i < num_connections; ++i) {
      grpc::ChannelArguments arguments;
      arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
      stubs_.push_back(v1::InferenceService::NewStub(
          grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments)));
    }
    {
      absl::MutexLock lock(&mutex_);
      num_waiting_ = num_streams;
      counts_.latency_histogram.resize(TokenClock::kNumTokens);
    }
    for (int i = 0; i < num_streams; ++i) {
      auto stream = std::make_unique<Stream>();
      stream->seed = i;
      v1::ChatRequest request;
      auto* message = request.add_messages();
      message->set_role(v1::ROLE_USER);
      message->set_content("What is MLA?");
      request.mutable_sampling()->set_seed(stream->seed);
      request.mutable_limits()->set_ignore_eos(true);
      request.mutable_outputs()->set_token_ids(true);
      stream->reader = stubs_[i % num_connections]->AsyncStreamChat(&stream->context, request,
                                                                    &queue_, stream.get());
      streams_.push_back(std::move(stream));
    }
    thread_ = std::thread([this] { Loop(); });
  }

  ~Impl() {
    for (auto& stream : streams_) stream->context.TryCancel();
    thread_.join();
    queue_.Shutdown();
    void* tag;
    bool ok;
    while (queue_.Next(&tag, &ok)) {
    }
  }

  bool AwaitAllFlowing() {
    absl::MutexLock lock(&mutex_);
    const auto flowing = [this]() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
      return num_waiting_ == 0 || num_ended_ > 0;
    };
    return mutex_.AwaitWithTimeout(absl::Condition(&flowing), absl::Seconds(60)) && num_ended_ == 0;
  }

  bool TakeCounts(LoadCounts* counts) {
    absl::MutexLock lock(&mutex_);
    *counts = std::exchange(counts_, {});
    counts_.latency_histogram.resize(TokenClock::kNumTokens);
    return num_ended_ == 0;
  }

 private:
  struct Stream {
    uint64_t seed = 0;
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientAsyncReader<v1::GenerationEvent>> reader;
    v1::GenerationEvent event;
    bool flowing = false;
    bool finishing = false;
    grpc::Status status;
  };

  void Loop() {
    void* tag;
    bool ok;
    size_t num_gone = 0;
    while (num_gone < streams_.size() && queue_.Next(&tag, &ok)) {
      Stream* stream = static_cast<Stream*>(tag);
      if (stream->finishing) {
        ++num_gone;
        if (stream->status.error_code() != grpc::StatusCode::CANCELLED) {
          std::fprintf(stderr, "a stream ended: %d %s\n", stream->status.error_code(),
                       stream->status.error_message().c_str());
        }
      } else if (!ok) {
        stream->finishing = true;
        stream->reader->Finish(&stream->status, stream);
        absl::MutexLock lock(&mutex_);
        ++num_ended_;
      } else {
        if (stream->event.has_delta()) Count(stream);
        stream->reader->Read(&stream->event, stream);
      }
    }
  }

  void Count(Stream* stream) {
    absl::MutexLock lock(&mutex_);
    const auto& ids = stream->event.delta().token_ids();
    ++counts_.deltas;
    counts_.single_token_deltas += ids.size() == 1;
    counts_.tokens += ids.size();
    for (const int32_t id : ids) {
      ++counts_.latency_histogram[TokenClock::Age(id, stream->seed) / TokenClock::kTick];
    }
    if (!std::exchange(stream->flowing, true)) --num_waiting_;
  }

  std::vector<std::unique_ptr<v1::InferenceService::Stub>> stubs_;
  std::vector<std::unique_ptr<Stream>> streams_;
  grpc::CompletionQueue queue_;
  absl::Mutex mutex_;
  int num_waiting_ ABSL_GUARDED_BY(mutex_) = 0;
  int num_ended_ ABSL_GUARDED_BY(mutex_) = 0;
  LoadCounts counts_ ABSL_GUARDED_BY(mutex_);
  std::thread thread_;
};

Load::Load(const std::string& address, int num_streams, int num_connections)
    : impl_(std::make_unique<Impl>(address, num_streams, num_connections)) {}
Load::~Load() = default;
bool Load::AwaitAllFlowing() { return impl_->AwaitAllFlowing(); }
bool Load::TakeCounts(LoadCounts* counts) { return impl_->TakeCounts(counts); }

}  // namespace latentd
