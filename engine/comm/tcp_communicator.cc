#include "engine/comm/tcp_communicator.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "engine/status.h"

namespace latentd {
namespace {

// How long the reason of a peer that is gone may come after its end is seen. A process that dies
// closes both connections, which ends the waiting.
constexpr absl::Duration kReasonTime = absl::Seconds(1);

template <typename T>
absl::Span<const std::byte> AsBytes(absl::Span<const T> values) {
  return {reinterpret_cast<const std::byte*>(values.data()), values.size() * sizeof(T)};
}

void Copy(absl::Span<const std::byte> from, absl::Span<std::byte> to) {
  if (!to.empty()) std::memcpy(to.data(), from.data(), to.size());
}

// The header and the data of a message from byte `done` on: what sendmsg and recvmsg take.
class Message {
 public:
  Message(void* header, void* data, size_t size, size_t done) {
    Add(header, sizeof(MessageHeader), std::min(done, sizeof(MessageHeader)));
    Add(data, size, done - std::min(done, sizeof(MessageHeader)));
    message_.msg_iov = parts_;
  }
  msghdr* get() { return &message_; }

 private:
  void Add(void* begin, size_t size, size_t done) {
    if (done < size) {
      parts_[message_.msg_iovlen++] = {.iov_base = static_cast<std::byte*>(begin) + done,
                                       .iov_len = size - done};
    }
  }
  iovec parts_[2];
  msghdr message_ = {};
};

// Text of a peer, fit for a log.
std::string Printable(const char* text, size_t length) {
  std::string printable(text, length);
  for (char& c : printable) {
    if (c < ' ' || c > '~') c = '?';
  }
  return printable;
}

bool MayRetry(int error) { return error == EAGAIN || error == EINTR; }

}  // namespace

absl::StatusOr<std::unique_ptr<TcpCommunicator>> TcpCommunicator::Create(
    int rank, int world_size, absl::Duration call_timeout) {
  Socket interrupt(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!interrupt.is_open()) {
    return absl::ResourceExhaustedError(absl::StrCat("eventfd: ", ErrorText(errno)));
  }
  return std::unique_ptr<TcpCommunicator>(
      new TcpCommunicator(rank, world_size, call_timeout, std::move(interrupt)));
}

TcpCommunicator::TcpCommunicator(int rank, int world_size, absl::Duration call_timeout,
                                 Socket interrupt)
    : rank_(rank),
      world_size_(world_size),
      call_timeout_(call_timeout),
      interrupt_(std::move(interrupt)),
      transfers_(world_size),
      notes_(world_size),
      peers_(world_size) {}

absl::Status TcpCommunicator::Connect(const MeshSpec& spec, const Socket& listener,
                                      SteadyTime deadline) {
  const Call join{.kind = CallKind::kJoin, .number = static_cast<uint64_t>(spec.epoch)};
  std::vector<PeerSockets> sockets;
  const absl::Status formed = FormMesh(
      spec, listener, interrupt_.fd(), deadline,
      [&](absl::Span<const int> missing) {
        SetWaiting(join, {missing.begin(), missing.end()});
      },
      &sockets);
  for (const PeerSockets& peer : sockets) {
    if (peer.data.is_open()) TuneConnection(peer.data, call_timeout_);
    if (peer.control.is_open()) TuneConnection(peer.control, call_timeout_);
  }
  {
    absl::MutexLock lock(&mutex_);
    peers_ = std::move(sockets);
    if (!end_.ok()) TellPeers();
  }
  if (formed.ok()) return Run(join, /*fits=*/true, deadline);
  // Interrupted by an Abort(), or by a peer that has ended the group or is gone.
  for (int peer = 0; peer < world_size_ && absl::IsCancelled(formed) && !ended(); ++peer) {
    if (!peers_[peer].control.is_open()) continue;
    if (const absl::Status error = ReadNote(peer); !error.ok()) End(error, rank_);
    if (notes_[peer].closed && !ended()) End(Gone(peer, "it closed the connection"), rank_);
  }
  return error_ = Fail(join, formed);
}

absl::Status TcpCommunicator::AllGather(absl::Span<const std::byte> in, absl::Span<std::byte> out) {
  const Call call = Next(CallKind::kAllGather);
  const bool fits = out.size() == in.size() * world_size_;
  for (int r = 0; fits && r < world_size_; ++r) {
    transfers_[r].to = in;
    transfers_[r].from = out.subspan(r * in.size(), in.size());
  }
  return Run(call, fits, After(call_timeout_));
}

absl::Status TcpCommunicator::AllToAll(absl::Span<const absl::Span<const std::byte>> to,
                                       absl::Span<const absl::Span<std::byte>> from) {
  const Call call = Next(CallKind::kAllToAll);
  const bool fits = to.size() == transfers_.size() && from.size() == transfers_.size() &&
                    to[rank_].size() == from[rank_].size();
  for (int r = 0; fits && r < world_size_; ++r) {
    transfers_[r].to = to[r];
    transfers_[r].from = from[r];
  }
  return Run(call, fits, After(call_timeout_));
}

absl::Status TcpCommunicator::ReduceScatter(absl::Span<const float> in, absl::Span<float> out) {
  const Call call = Next(CallKind::kReduceScatter);
  const size_t n = out.size();
  const bool fits = in.size() == n * world_size_;
  if (fits && parts_.size() < in.size()) parts_.resize(in.size());
  const auto part = [&](int r) { return absl::MakeSpan(parts_).subspan(r * n, n); };
  for (int r = 0; fits && r < world_size_; ++r) {
    transfers_[r].to = AsBytes(in.subspan(r * n, n));
    transfers_[r].from = {reinterpret_cast<std::byte*>(part(r).data()), n * sizeof(float)};
  }
  RETURN_IF_ERROR(Run(call, fits, After(call_timeout_)));
  std::copy_n(part(0).data(), n, out.begin());
  for (int r = 1; r < world_size_; ++r) AddTo(part(r), out);
  return absl::OkStatus();
}

absl::Status TcpCommunicator::Barrier() {
  const Call call = Next(CallKind::kBarrier);
  for (Transfer& transfer : transfers_) transfer.to = {}, transfer.from = {};
  return Run(call, /*fits=*/true, After(call_timeout_));
}

void TcpCommunicator::Abort(const absl::Status& why) { End(AbortError(why), rank_); }

std::string TcpCommunicator::waiting_in() const {
  absl::MutexLock lock(&mutex_);
  return waiting_for_.empty() ? "" : WaitText(waiting_call_, waiting_for_);
}

absl::Status TcpCommunicator::Run(const Call& call, bool fits, SteadyTime deadline) {
  if (!error_.ok()) return error_;
  const absl::Status status =
      fits ? Exchange(call, deadline)
           : absl::InternalError(absl::StrCat("rank ", rank_, " gives buffers that do not fit"));
  if (!status.ok()) error_ = Fail(call, status);
  SetWaiting({}, {});
  return error_;
}

absl::Status TcpCommunicator::Exchange(const Call& call, SteadyTime deadline) {
  if (ended()) return EndError();
  Copy(transfers_[rank_].to, transfers_[rank_].from);
  std::vector<int> pending;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer != rank_) pending.push_back(peer);
  }
  SetWaiting(call, pending);
  for (const int peer : pending) {
    Transfer& transfer = transfers_[peer];
    transfer.sent = transfer.received = 0;
    transfer.sent_header = {.kind = static_cast<uint32_t>(call.kind),
                            .number = call.number,
                            .size = transfer.to.size()};
    RETURN_IF_ERROR(Send(peer));
  }
  const auto done = [&](int peer) {
    return !transfers_[peer].sending() && !transfers_[peer].receiving();
  };
  while (!pending.empty()) {
    // When the time is up, what has come by now counts still: a rank that was stopped itself finds
    // there what became of the group.
    const int timeout = PollTimeout(deadline);
    RETURN_IF_ERROR(Progress(call, timeout));
    if (std::erase_if(pending, done) > 0) SetWaiting(call, pending);
    if (timeout > 0 || pending.empty()) continue;
    return absl::DeadlineExceededError(
        call.kind == CallKind::kJoin
            ? "not there in time"
            : absl::StrCat("not there within ", absl::FormatDuration(call_timeout_)));
  }
  return absl::OkStatus();
}

// Waits until something can be sent or has come, at most `timeout` ms, and does it.
absl::Status TcpCommunicator::Progress(const Call& call, int timeout) {
  fds_.clear();
  fds_.push_back({.fd = interrupt_.fd(), .events = POLLIN, .revents = 0});
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    const Transfer& transfer = transfers_[peer];
    const int events = (transfer.receiving() ? POLLIN : 0) | (transfer.sending() ? POLLOUT : 0);
    // Negative ones are passed over.
    fds_.push_back({.fd = notes_[peer].closed ? -1 : peers_[peer].control.fd(),
                    .events = POLLIN,
                    .revents = 0});
    fds_.push_back({.fd = events == 0 ? -1 : peers_[peer].data.fd(),
                    .events = static_cast<int16_t>(events),
                    .revents = 0});
  }
  const int ready = poll(fds_.data(), fds_.size(), timeout);
  if (ready < 0 && errno != EINTR) {
    return absl::InternalError(absl::StrCat("poll: ", ErrorText(errno)));
  }
  if (ready <= 0) return absl::OkStatus();
  if (fds_[0].revents != 0) return EndError();
  size_t i = 1;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    if (fds_[i].revents != 0) RETURN_IF_ERROR(ReadNote(peer));
    i += 2;
  }
  i = 2;
  for (int peer = 0; peer < world_size_; ++peer) {
    if (peer == rank_) continue;
    const int events = fds_[i].revents;
    i += 2;
    if (events == 0) continue;
    // What came before the end of a connection is taken first.
    if (transfers_[peer].receiving() && (events & ~POLLOUT) != 0) {
      RETURN_IF_ERROR(Receive(call, peer));
    }
    if (transfers_[peer].sending() && (events & ~POLLIN) != 0) RETURN_IF_ERROR(Send(peer));
  }
  return absl::OkStatus();
}

absl::Status TcpCommunicator::Send(int peer) {
  Transfer& transfer = transfers_[peer];
  Message message(&transfer.sent_header, const_cast<std::byte*>(transfer.to.data()),
                  transfer.to.size(), transfer.sent);
  const ssize_t n = sendmsg(peers_[peer].data.fd(), message.get(), MSG_NOSIGNAL);
  if (n < 0) return MayRetry(errno) ? absl::OkStatus() : PeerGone(peer, ErrorText(errno));
  transfer.sent += static_cast<size_t>(n);
  return absl::OkStatus();
}

absl::Status TcpCommunicator::Receive(const Call& call, int peer) {
  Transfer& transfer = transfers_[peer];
  // Data before its header is judged goes where that call wants data; if the header is another
  // one, the call fails and nobody looks at it.
  Message message(&transfer.received_header, transfer.from.data(), transfer.from.size(),
                  transfer.received);
  const ssize_t n = recvmsg(peers_[peer].data.fd(), message.get(), 0);
  if (n == 0) return PeerGone(peer, "it closed the connection");
  if (n < 0) return MayRetry(errno) ? absl::OkStatus() : PeerGone(peer, ErrorText(errno));
  const bool judged = transfer.received >= sizeof(MessageHeader);
  transfer.received += static_cast<size_t>(n);
  return judged || transfer.received < sizeof(MessageHeader) ? absl::OkStatus()
                                                             : CheckHeader(call, peer);
}

absl::Status TcpCommunicator::CheckHeader(const Call& call, int peer) const {
  const MessageHeader& header = transfers_[peer].received_header;
  const std::string who = absl::StrCat("rank ", peer);
  if (header.magic != MessageHeader::kMagic) {
    return absl::InternalError(absl::StrCat(who, " sent bytes that are no message"));
  }
  const Call theirs{.kind = static_cast<CallKind>(header.kind), .number = header.number};
  if (theirs.kind != call.kind || theirs.number != call.number) {
    return absl::InternalError(
        absl::StrCat(who, " calls ", CallText(theirs), ", rank ", rank_, " ", CallText(call)));
  }
  if (header.size != transfers_[peer].from.size()) {
    return absl::InternalError(absl::StrCat(who, " gives ", header.size, " bytes, rank ", rank_,
                                            " takes ", transfers_[peer].from.size(), " bytes"));
  }
  return absl::OkStatus();
}

// An error once the peer has said that, and why, the group has ended.
absl::Status TcpCommunicator::ReadNote(int peer) {
  IncomingNote& in = notes_[peer];
  iovec parts[2] = {
      {.iov_base = reinterpret_cast<std::byte*>(&in.note) + std::min(in.received, sizeof(Note)),
       .iov_len = sizeof(Note) - std::min(in.received, sizeof(Note))},
      {.iov_base = in.text + (in.received - std::min(in.received, sizeof(Note))), .iov_len = 0}};
  parts[1].iov_len =
      static_cast<size_t>(in.text + sizeof(in.text) - static_cast<char*>(parts[1].iov_base));
  msghdr message = {};
  message.msg_iov = parts;
  message.msg_iovlen = 2;
  const ssize_t n = recvmsg(peers_[peer].control.fd(), &message, 0);
  if (n < 0 && MayRetry(errno)) return absl::OkStatus();
  if (n <= 0) {
    in.closed = true;  // what that means, the data says: the peer may have left after its last call
    return absl::OkStatus();
  }
  in.received += static_cast<size_t>(n);
  if (in.received < sizeof(Note)) return absl::OkStatus();
  const Note& note = in.note;
  if (note.magic != Note::kMagic || note.length > Note::kMaxLength || note.code < 1 ||
      note.code > 16 || note.origin < 0 || note.origin >= world_size_) {
    return absl::InternalError(
        absl::StrCat("rank ", peer, " sent bytes that are no message, for control"));
  }
  if (in.received < sizeof(Note) + note.length) return absl::OkStatus();
  End(absl::Status(static_cast<absl::StatusCode>(note.code), Printable(in.text, note.length)),
      note.origin);
  return EndError();
}

// A peer that ends the group says why before it goes; that counts for more than that it is gone.
absl::Status TcpCommunicator::PeerGone(int peer, const std::string& how) {
  const SteadyTime until = After(kReasonTime);
  while (!notes_[peer].closed && !ended()) {
    pollfd fd{.fd = peers_[peer].control.fd(), .events = POLLIN, .revents = 0};
    const int ready = poll(&fd, 1, PollTimeout(until));
    if (ready == 0) break;
    if (ready > 0) RETURN_IF_ERROR(ReadNote(peer));
  }
  return ended() ? EndError() : Gone(peer, how);
}

absl::Status TcpCommunicator::Gone(int peer, const std::string& how) {
  return absl::UnavailableError(absl::StrCat("rank ", peer, " is gone: ", how));
}

absl::Status TcpCommunicator::Fail(const Call& call, const absl::Status& error) {
  const std::vector<int> waiting_for = WaitingFor();
  const absl::Status full = CallError(call, waiting_for, error);
  return End(full, rank_) ? full : CallError(call, waiting_for, EndError());
}

bool TcpCommunicator::End(const absl::Status& error, int origin) {
  absl::MutexLock lock(&mutex_);
  if (!end_.ok()) return false;
  end_ = error;
  end_origin_ = origin;
  const uint64_t one = 1;
  LATENTD_CHECK(write(interrupt_.fd(), &one, sizeof(one)) == sizeof(one));
  TellPeers();
  return true;
}

void TcpCommunicator::TellPeers() {
  const absl::string_view text = end_.message();
  const Note note{.origin = end_origin_,
                  .code = static_cast<int32_t>(end_.code()),
                  .length = static_cast<uint32_t>(std::min(text.size(), Note::kMaxLength))};
  std::string message(reinterpret_cast<const char*>(&note), sizeof(note));
  message.append(text.data(), note.length);
  for (const PeerSockets& peer : peers_) {
    // The only bytes that this connection ever carries: its buffer takes them, or it has failed.
    if (peer.control.is_open())
      send(peer.control.fd(), message.data(), message.size(), MSG_NOSIGNAL);
  }
}

absl::Status TcpCommunicator::EndError() const {
  absl::MutexLock lock(&mutex_);
  if (end_origin_ == rank_) return end_;
  return absl::Status(end_.code(), absl::StrCat("rank ", end_origin_, ": ", end_.message()));
}

bool TcpCommunicator::ended() const {
  absl::MutexLock lock(&mutex_);
  return !end_.ok();
}

void TcpCommunicator::SetWaiting(const Call& call, std::vector<int> ranks) {
  absl::MutexLock lock(&mutex_);
  waiting_call_ = call;
  waiting_for_ = std::move(ranks);
}

std::vector<int> TcpCommunicator::WaitingFor() const {
  absl::MutexLock lock(&mutex_);
  return waiting_for_;
}

}  // namespace latentd
