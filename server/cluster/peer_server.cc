#include "server/cluster/peer_server.h"

#include <deque>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "grpcpp/alarm.h"
#include "server/status.h"

namespace latentd {

// What the completion queue gives back.
struct PeerServer::Tag {
  virtual ~Tag() = default;
  virtual void End(bool ok) = 0;
};

class PeerServer::Posted final : public Tag {
 public:
  Posted(PeerServer* server, std::function<void()> work)
      : server_(server), work_(std::move(work)) {}

  void Begin() {
    ++server_->num_operations_;
    alarm_.Set(server_->queue_.get(), gpr_time_0(GPR_CLOCK_MONOTONIC), static_cast<Tag*>(this));
  }
  void End(bool) override {
    work_();
    --server_->num_operations_;
    delete this;
  }

 private:
  PeerServer* const server_;
  const std::function<void()> work_;
  grpc::Alarm alarm_;
};

// A stream is there as long as gRPC has an operation of it, and as long as somebody holds it.
class PeerServer::Stream final : public PeerStream, public std::enable_shared_from_this<Stream> {
 public:
  Stream(PeerServer* server, bool rank)
      : server_(server),
        handler_(rank ? server->options_.ranks : server->options_.nodes),
        rank_(rank),
        stream_(&context_) {}

  // One of gRPC's operations.
  struct Operation final : Tag {
    explicit Operation(void (Stream::*done)(bool ok)) : done(done) {}

    void (Stream::*done)(bool ok);
    std::shared_ptr<Stream> stream = nullptr;  // while it is under way

    void* Begin(std::shared_ptr<Stream> self) {
      stream = std::move(self);
      ++stream->server_->num_operations_;
      return static_cast<Tag*>(this);
    }
    void End(bool ok) override {
      const std::shared_ptr<Stream> kept = std::move(stream);  // `this` is a part of it
      (kept.get()->*done)(ok);
      --kept->server_->num_operations_;
    }
  };

  // Waits for a peer.
  void Accept() {
    auto* queue = server_->queue_.get();
    void* tag = accept_.Begin(shared_from_this());
    if (rank_) {
      server_->service_.RequestJoin(&context_, &stream_, queue, queue, tag);
    } else {
      server_->service_.RequestAttach(&context_, &stream_, queue, queue, tag);
    }
  }

  void Send(grpc::ByteBuffer message) override ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (broken_ || finish_wanted_) return;
    outbox_.push_back(std::move(message));
    Continue();
  }

  void Finish(const absl::Status& status) override ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (std::exchange(finish_wanted_, true)) return;
    status_ = ToGrpcStatus(status);
    Continue();
  }

  void Cancel() override ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    if (!finished_) context_.TryCancel();
  }

  std::string peer_host() const override { return host_; }

 private:
  void OnAccepted(bool ok) {
    if (!ok) return;  // the server stops
    server_->Accept(rank_);
    host_ = PeerHost(context_.peer());
    Read();
  }

  void Read() { stream_.Read(&incoming_, read_.Begin(shared_from_this())); }

  void OnRead(bool ok) ABSL_LOCKS_EXCLUDED(mutex_) {
    if (ok) {
      handler_->OnMessage(shared_from_this(), &incoming_);
      Read();
      return;
    }
    handler_->OnEnd(shared_from_this());
    absl::MutexLock lock(&mutex_);
    broken_ = true;
    finish_wanted_ = true;
    Continue();
  }

  void OnWritten(bool ok) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (!ok) broken_ = true;
    Continue();
  }

  void OnFinished(bool) ABSL_LOCKS_EXCLUDED(mutex_) {
    absl::MutexLock lock(&mutex_);
    finished_ = true;
  }

  // Begins what may begin: the next message, or the end when there is none.
  void Continue() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (broken_) outbox_.clear();
    if (writing_ || finishing_) return;
    if (!outbox_.empty()) {
      writing_ = true;
      const grpc::ByteBuffer message = std::move(outbox_.front());
      outbox_.pop_front();
      stream_.Write(message, write_.Begin(shared_from_this()));
    } else if (finish_wanted_) {
      finishing_ = true;
      stream_.Finish(status_, finish_.Begin(shared_from_this()));
    }
  }

  PeerServer* const server_;
  PeerStream::Handler* const handler_;
  const bool rank_;  // or a node's agent
  grpc::ServerContext context_;
  grpc::ServerAsyncReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer> stream_;
  Operation accept_{&Stream::OnAccepted};
  Operation read_{&Stream::OnRead};
  Operation write_{&Stream::OnWritten};
  Operation finish_{&Stream::OnFinished};
  grpc::ByteBuffer incoming_;
  std::string host_;  // constant once accepted

  absl::Mutex mutex_;
  std::deque<grpc::ByteBuffer> outbox_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool broken_ ABSL_GUARDED_BY(mutex_) = false;  // nothing can be sent any more
  bool finish_wanted_ ABSL_GUARDED_BY(mutex_) = false;
  bool finishing_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  grpc::Status status_ ABSL_GUARDED_BY(mutex_);
};

absl::StatusOr<std::unique_ptr<PeerServer>> PeerServer::Start(Options options) {
  auto server = std::unique_ptr<PeerServer>(new PeerServer(std::move(options)));
  grpc::ServerBuilder builder;
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // A rank pings, in a step and between steps, to know that the leader is there.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 1000);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
  // As in leader_channel.cc.
  builder.AddChannelArgument(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 1 << 20);
  builder.AddChannelArgument(GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0);
  builder.SetMaxReceiveMessageSize(64 << 20);
  builder.SetMaxSendMessageSize(-1);
  builder.AddListeningPort(server->options_.listen, grpc::InsecureServerCredentials(),
                           &server->port_);
  builder.RegisterService(&server->service_);
  server->queue_ = builder.AddCompletionQueue();
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || server->port_ == 0) {
    server->queue_->Shutdown();
    return absl::UnavailableError(
        absl::StrCat("cannot listen for ranks on '", server->options_.listen,
                     "': the port is in use, or the address is not one of this machine"));
  }
  server->Accept(/*rank=*/true);
  server->Accept(/*rank=*/false);
  server->thread_ = std::thread([self = server.get()] { self->Run(); });
  return server;
}

PeerServer::~PeerServer() { Stop(); }

void PeerServer::Stop(absl::Duration grace) {
  if (!thread_.joinable()) return;
  server_->Shutdown(absl::ToChronoTime(absl::Now() + grace));
  stopping_ = true;
  thread_.join();
}

void PeerServer::Post(std::function<void()> work) { (new Posted(this, std::move(work)))->Begin(); }

void PeerServer::Accept(bool rank) { std::make_shared<Stream>(this, rank)->Accept(); }

void PeerServer::Run() {
  absl::Time next_tick = absl::Now() + options_.tick_interval;
  bool shut_down = false;
  while (true) {
    // A stream that can still begin an operation has one under way.
    if (!shut_down && stopping_ && num_operations_ == 0) {
      queue_->Shutdown();
      shut_down = true;
    }
    void* tag = nullptr;
    bool ok = false;
    const auto next = queue_->AsyncNext(&tag, &ok, absl::ToChronoTime(next_tick));
    if (next == grpc::CompletionQueue::SHUTDOWN) return;
    if (next == grpc::CompletionQueue::GOT_EVENT) {
      // What was written before its Begin() counted it is seen from here on. The queue sees to that
      // as well, but ThreadSanitizer cannot look into it.
      static_cast<void>(num_operations_.load(std::memory_order_acquire));
      static_cast<Tag*>(tag)->End(ok);
    }
    if (const absl::Time now = absl::Now(); now >= next_tick) {
      if (options_.on_tick && !stopping_) options_.on_tick();
      next_tick = now + options_.tick_interval;
    }
  }
}

std::string PeerHost(const std::string& peer) {
  absl::string_view host = peer;
  if (!absl::ConsumePrefix(&host, "ipv4:") && !absl::ConsumePrefix(&host, "ipv6:")) return "";
  host = host.substr(0, host.rfind(':'));
  return absl::StrReplaceAll(host, {{"%5B", "["}, {"%5D", "]"}, {"%25", "%"}});
}

}  // namespace latentd
