#ifndef LATENTD_SERVER_CLUSTER_PEER_SERVER_H_
#define LATENTD_SERVER_CLUSTER_PEER_SERVER_H_

#include <atomic>
#include <concepts>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "grpcpp/grpcpp.h"
#include "latentd/v1/rank.grpc.pb.h"

namespace latentd {

// The leader's end of a stream that a rank or a node's agent keeps open.
//
// Messages are grpc::ByteBuffers: a step's plan is encoded once, into the bytes that are sent.
class PeerStream {
 public:
  // Called by the server's thread, one call at a time, with no lock held; must not block.
  class Handler {
   public:
    virtual ~Handler() = default;
    virtual void OnMessage(const std::shared_ptr<PeerStream>& stream,
                           grpc::ByteBuffer* message) = 0;
    // The peer is gone, or the stream was ended here. Nothing follows.
    virtual void OnEnd(const std::shared_ptr<PeerStream>& stream) = 0;
  };

  virtual ~PeerStream() = default;

  // Sends, in the order of the calls; never blocks. What a stream that ends still has to send is
  // dropped. Any thread, and so are the methods below.
  virtual void Send(grpc::ByteBuffer message) = 0;
  template <typename Message>
  requires std::derived_from<Message, google::protobuf::Message>
  void Send(const Message& message) {
    grpc::ByteBuffer buffer;
    bool own_buffer = false;
    // Fails only for a message of two gigabytes.
    (void)grpc::SerializationTraits<Message>::Serialize(message, &buffer, &own_buffer);
    Send(std::move(buffer));
  }

  // Ends the stream with `status`, once all is sent.
  virtual void Finish(const absl::Status& status) = 0;

  // Ends the stream at once, whether the peer listens or not.
  virtual void Cancel() = 0;

  // The address of the peer, without its port.
  virtual std::string peer_host() const = 0;
};

// Where ranks and agents come in: RankService on one port, served by one thread, which also calls
// `on_tick` about every tick_interval.
class PeerServer {
 public:
  struct Options {
    std::string listen;  // "host:port"; port 0: any
    PeerStream::Handler* ranks = nullptr;
    PeerStream::Handler* nodes = nullptr;
    absl::Duration tick_interval = absl::Milliseconds(20);
    std::function<void()> on_tick;
  };

  // UNAVAILABLE names an address on which it cannot listen.
  static absl::StatusOr<std::unique_ptr<PeerServer>> Start(Options options);
  ~PeerServer();  // Stop()

  int port() const { return port_; }

  // Has the server's thread do `work` soon. What it sends to many streams then wakes it once, not
  // for every one of them. Any thread; not after Stop().
  void Post(std::function<void()> work);

  // Ends all streams, those that are Finish()ed and listened to within `grace`; then no handler is
  // called any more. Not from a handler.
  void Stop(absl::Duration grace = absl::ZeroDuration());

 private:
  struct Tag;
  class Posted;
  class Stream;
  using Service = latentd::v1::RankService::WithRawMethod_Join<
      latentd::v1::RankService::WithRawMethod_Attach<latentd::v1::RankService::Service>>;

  explicit PeerServer(Options options) : options_(std::move(options)) {}
  void Accept(bool rank);
  void Run();

  const Options options_;
  Service service_;
  std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  std::atomic<int> num_operations_{0};  // under way
  std::atomic<bool> stopping_{false};
  std::thread thread_;
};

// The host in what gRPC calls a peer: "ipv4:10.0.0.1:4567", "ipv6:%5B::1%5D:4567". Empty for other
// kinds.
std::string PeerHost(const std::string& peer);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLUSTER_PEER_SERVER_H_
