#include "engine/comm/tcp_forming.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <list>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "engine/comm/tcp_wire.h"
#include "engine/status.h"

namespace latentd {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kFirstPause(5);  // before a rank is dialled again; doubled each time
constexpr milliseconds kLongestPause(200);
constexpr milliseconds kLookupPause(5);
constexpr auto kGreetingTime = std::chrono::seconds(5);  // for a visitor to say who it is
constexpr size_t kMaxVisitors = 256;                     // that have not said it yet

// A fixed-size message that arrives in pieces.
template <typename Message>
struct Incoming {
  Message message;
  size_t received = 0;

  bool complete() const { return received == sizeof(Message); }

  // Reads what is there. An error when the connection has ended.
  absl::Status Read(const Socket& socket) {
    auto* bytes = reinterpret_cast<std::byte*>(&message);
    const ssize_t n = recv(socket.fd(), bytes + received, sizeof(Message) - received, 0);
    if (n == 0) return absl::UnavailableError("it closed the connection");
    if (n < 0 && errno != EAGAIN && errno != EINTR) {
      return absl::UnavailableError(ErrorText(errno));
    }
    received += static_cast<size_t>(std::max<ssize_t>(n, 0));
    return absl::OkStatus();
  }
};

// Into the empty buffer of a new connection: it takes all or has failed.
template <typename Message>
bool SendWhole(const Socket& socket, const Message& message) {
  return send(socket.fd(), &message, sizeof(message), MSG_NOSIGNAL) ==
         static_cast<ssize_t>(sizeof(message));
}

// A name lookup. It blocks as long as the name service likes, so a host name gets a thread, which
// nobody has to wait for.
class Lookup {
 public:
  explicit Lookup(const HostPort& address) : state_(std::make_shared<State>()) {
    state_->found = Resolve(address, /*numeric=*/true);
    if (state_->found.ok()) {
      state_->done = true;
      return;
    }
    std::thread([state = state_, address] {
      state->found = Resolve(address, /*numeric=*/false);
      state->done = true;
    }).detach();
  }

  bool done() const { return state_->done; }
  const absl::StatusOr<std::vector<SocketAddress>>& found() const { return state_->found; }

 private:
  struct State {
    absl::StatusOr<std::vector<SocketAddress>> found;  // when done
    std::atomic<bool> done = false;
  };
  std::shared_ptr<State> state_;
};

// A connection that this rank makes.
struct Dial {
  enum class State { kPausing, kConnecting, kGreeting, kDone };

  int peer = 0;
  Channel channel = Channel::kData;
  HostPort address = {};
  State state = State::kPausing;
  SteadyTime next_try = {};
  milliseconds pause = kFirstPause;
  std::optional<Lookup> lookup = std::nullopt;
  size_t num_tries = 0;
  Socket socket = {};
  Incoming<Welcome> answer = {};
  std::string trouble = {};  // why the last try failed
};

// A connection that has come in and has not said yet whose it is.
struct Visitor {
  Socket socket;
  SteadyTime until;
  Incoming<Hello> hello = {};
};

class Forming {
 public:
  Forming(const MeshSpec& spec, const Socket& listener, std::vector<PeerSockets>* peers)
      : spec_(spec), listener_(listener), token_(GroupToken(spec.addresses)), peers_(*peers) {
    peers_.clear();
    peers_.resize(spec.addresses.size());
  }

  absl::Status Run(int interrupt, SteadyTime deadline,
                   absl::FunctionRef<void(absl::Span<const int>)> missing) {
    RETURN_IF_ERROR(PrepareDials());
    std::vector<int> before;
    while (true) {
      const std::vector<int> now_missing = Missing();
      if (now_missing.empty()) return absl::OkStatus();
      if (now_missing != before) missing(now_missing);
      before = now_missing;
      if (PollTimeout(deadline) == 0) return LateError();
      StartDials();
      RETURN_IF_ERROR(PollOnce(interrupt, deadline));
    }
  }

 private:
  absl::Status PrepareDials() {
    for (int peer = 0; peer < spec_.rank; ++peer) {
      absl::StatusOr<HostPort> address = ParseHostPort(spec_.addresses[peer]);
      if (!address.ok()) return address.status();
      for (const Channel channel : {Channel::kData, Channel::kControl}) {
        dials_.push_back({.peer = peer, .channel = channel, .address = *address});
      }
    }
    return absl::OkStatus();
  }

  std::vector<int> Missing() const {
    std::vector<int> ranks;
    for (int peer = 0; peer < static_cast<int>(peers_.size()); ++peer) {
      const bool connected = peers_[peer].data.is_open() && peers_[peer].control.is_open();
      if (peer != spec_.rank && !connected) ranks.push_back(peer);
    }
    return ranks;
  }

  absl::Status LateError() const {
    std::vector<std::string> troubles;
    for (const Dial& dial : dials_) {
      if (dial.state == Dial::State::kDone || dial.channel != Channel::kData) continue;
      troubles.push_back(absl::StrCat("rank ", dial.peer, " at ", HostPortText(dial.address), ": ",
                                      dial.trouble.empty() ? "no answer" : dial.trouble));
    }
    return absl::DeadlineExceededError(absl::StrCat(
        "not there in time", troubles.empty() ? "" : "; ", absl::StrJoin(troubles, "; ")));
  }

  void StartDials() {
    const SteadyTime now = std::chrono::steady_clock::now();
    for (Dial& dial : dials_) {
      if (dial.state != Dial::State::kPausing || now < dial.next_try) continue;
      if (!dial.lookup) dial.lookup.emplace(dial.address);
      if (!dial.lookup->done()) {
        dial.next_try = now + kLookupPause;
        continue;
      }
      const absl::StatusOr<std::vector<SocketAddress>>& found = dial.lookup->found();
      if (!found.ok()) {
        Retry(&dial, found.status().message());
        continue;
      }
      // A name may have several addresses; they take turns.
      absl::StatusOr<Socket> socket = BeginConnect((*found)[dial.num_tries++ % found->size()]);
      if (!socket.ok()) {
        Retry(&dial, socket.status().message());
        continue;
      }
      dial.socket = *std::move(socket);
      dial.state = Dial::State::kConnecting;
    }
  }

  void Retry(Dial* dial, absl::string_view why) {
    dial->trouble = std::string(why);
    dial->socket.Close();
    dial->answer = {};
    // Names change too: a rank that was started again may be elsewhere.
    if (dial->lookup && (!dial->lookup->found().ok() || dial->num_tries % 8 == 0)) {
      dial->lookup.reset();
    }
    dial->state = Dial::State::kPausing;
    dial->next_try = std::chrono::steady_clock::now() + dial->pause;
    dial->pause = std::min(dial->pause * 2, kLongestPause);
  }

  absl::Status PollOnce(int interrupt, SteadyTime deadline) {
    std::vector<pollfd> fds = {{.fd = interrupt, .events = POLLIN, .revents = 0},
                               {.fd = listener_.fd(), .events = POLLIN, .revents = 0}};
    SteadyTime until = deadline;
    for (const Dial& dial : dials_) {
      if (dial.state == Dial::State::kPausing) until = std::min(until, dial.next_try);
      const bool connecting = dial.state == Dial::State::kConnecting;
      const bool done = dial.state == Dial::State::kDone;
      fds.push_back({.fd = done ? -1 : dial.socket.fd(),  // negative ones are passed over
                     .events = static_cast<int16_t>(connecting ? POLLOUT : POLLIN),
                     .revents = 0});
    }
    for (const Visitor& visitor : visitors_) {
      until = std::min(until, visitor.until);
      fds.push_back({.fd = visitor.socket.fd(), .events = POLLIN, .revents = 0});
    }
    // A peer that is connected says nothing here unless it has ended the group, or is gone.
    const size_t first_peer = fds.size();
    for (const PeerSockets& peer : peers_) {
      fds.push_back({.fd = peer.control.fd(), .events = POLLIN, .revents = 0});
    }
    if (poll(fds.data(), fds.size(), PollTimeout(until)) < 0) {
      if (errno == EINTR) return absl::OkStatus();
      return absl::InternalError(absl::StrCat("poll: ", ErrorText(errno)));
    }
    for (size_t i = first_peer; i < fds.size(); ++i) {
      if (fds[i].revents != 0) return absl::CancelledError("a peer ends it");
    }
    if (fds[0].revents != 0) return absl::CancelledError("interrupted");
    size_t i = 2;
    for (Dial& dial : dials_) {
      if (fds[i++].revents != 0) RETURN_IF_ERROR(Advance(&dial));
    }
    const SteadyTime now = std::chrono::steady_clock::now();
    for (auto visitor = visitors_.begin(); visitor != visitors_.end(); ++i) {
      const bool stays = fds[i].revents == 0 ? now < visitor->until : Hear(&*visitor);
      visitor = stays ? std::next(visitor) : visitors_.erase(visitor);
    }
    return fds[1].revents != 0 ? Accept() : absl::OkStatus();
  }

  absl::Status Advance(Dial* dial) {
    if (dial->state == Dial::State::kConnecting) {
      const absl::Status error = ConnectError(dial->socket);
      const Hello hello{.channel = dial->channel,
                        .epoch = spec_.epoch,
                        .token = token_,
                        .from = spec_.rank,
                        .to = dial->peer};
      if (!error.ok()) {
        Retry(dial, error.message());
      } else if (!SendWhole(dial->socket, hello)) {
        Retry(dial, "it closed the connection");
      } else {
        dial->state = Dial::State::kGreeting;
      }
      return absl::OkStatus();
    }
    if (const absl::Status error = dial->answer.Read(dial->socket); !error.ok()) {
      Retry(dial, error.message());
      return absl::OkStatus();
    }
    return dial->answer.complete() ? Judge(dial) : absl::OkStatus();
  }

  absl::Status Judge(Dial* dial) {
    const Welcome& answer = dial->answer.message;
    const auto refused = [&](absl::string_view how) {
      return absl::InternalError(
          absl::StrCat("rank ", dial->peer, " at ", HostPortText(dial->address), how));
    };
    if (answer.magic != Welcome::kMagic) return refused(" answers what no rank does");
    if (answer.version != kWireVersion || answer.answer == Answer::kOtherVersion) {
      return refused(
          absl::StrCat(" speaks version ", answer.version, ", this rank ", kWireVersion));
    }
    if (answer.answer != Answer::kWelcome) {
      Retry(dial, absl::StrCat("it is in another group, ", answer.epoch));
      return absl::OkStatus();
    }
    Take(dial->peer, dial->channel, std::move(dial->socket));
    dial->state = Dial::State::kDone;
    return absl::OkStatus();
  }

  absl::Status Accept() {
    while (true) {
      Socket socket(accept4(listener_.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
      if (socket.is_open()) {
        // The oldest stranger has to go where there are too many: ranks must always come through.
        if (visitors_.size() >= kMaxVisitors) visitors_.pop_front();
        visitors_.push_back({.socket = std::move(socket),
                             .until = std::chrono::steady_clock::now() + kGreetingTime});
      } else if (errno == EAGAIN) {
        return absl::OkStatus();
      } else if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM) {
        return absl::ResourceExhaustedError(absl::StrCat("accept: ", ErrorText(errno)));
      }  // else: that one connection has failed already
    }
  }

  // False: the visitor is done with.
  bool Hear(Visitor* visitor) {
    if (!visitor->hello.Read(visitor->socket).ok()) return false;
    if (!visitor->hello.complete()) return true;
    const Hello& hello = visitor->hello.message;
    if (hello.magic != Hello::kMagic) return false;
    Welcome welcome{.epoch = spec_.epoch};
    if (hello.version != kWireVersion) {
      welcome.answer = Answer::kOtherVersion;
    } else if (hello.epoch != spec_.epoch || hello.token != token_ || hello.to != spec_.rank ||
               hello.from <= spec_.rank || hello.from >= static_cast<int>(peers_.size()) ||
               (hello.channel != Channel::kData && hello.channel != Channel::kControl)) {
      welcome.answer = Answer::kOtherGroup;
    }
    const bool sent = SendWhole(visitor->socket, welcome);
    if (sent && welcome.answer == Answer::kWelcome) {
      Take(hello.from, hello.channel, std::move(visitor->socket));
    }
    return false;
  }

  // A rank that dials twice has given up its first connection.
  void Take(int peer, Channel channel, Socket socket) {
    (channel == Channel::kData ? peers_[peer].data : peers_[peer].control) = std::move(socket);
  }

  const MeshSpec& spec_;
  const Socket& listener_;
  const uint64_t token_;
  std::vector<PeerSockets>& peers_;
  std::vector<Dial> dials_;
  std::list<Visitor> visitors_;  // oldest first
};

}  // namespace

uint64_t GroupToken(absl::Span<const std::string> addresses) {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, over each address with its end
  for (const std::string& address : addresses) {
    for (const char* c = address.c_str();; ++c) {
      hash = (hash ^ static_cast<unsigned char>(*c)) * 0x100000001b3;
      if (*c == '\0') break;
    }
  }
  return hash;
}

absl::Status FormMesh(const MeshSpec& spec, const Socket& listener, int interrupt,
                      SteadyTime deadline, absl::FunctionRef<void(absl::Span<const int>)> missing,
                      std::vector<PeerSockets>* peers) {
  return Forming(spec, listener, peers).Run(interrupt, deadline, missing);
}

}  // namespace latentd
