#include "engine/comm/tcp_listener.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "engine/comm/call.h"
#include "engine/comm/tcp_communicator.h"
#include "engine/comm/tcp_forming.h"
#include "engine/status.h"

namespace latentd {

absl::StatusOr<std::unique_ptr<TcpListener>> TcpListener::Listen(const Options& options) {
  ASSIGN_OR_RETURN(HostPort address, ParseHostPort(options.listen));
  const bool everywhere = address.host.empty() || address.host == "0.0.0.0" || address.host == "::";
  if (address.host.empty()) address.host = "::";
  ASSIGN_OR_RETURN(const std::vector<SocketAddress> addresses, Resolve(address, /*numeric=*/false));
  ASSIGN_OR_RETURN(Socket socket, ListenOn(addresses[0]));
  ASSIGN_OR_RETURN(const SocketAddress bound, LocalAddress(socket));
  ASSIGN_OR_RETURN(HostPort told, ParseHostPort(SocketAddressText(bound)));
  told.host = everywhere ? "" : address.host;
  if (!options.advertised_host.empty()) told.host = options.advertised_host;
  return std::unique_ptr<TcpListener>(
      new TcpListener(std::move(socket), HostPortText(told), options.call_timeout));
}

TcpListener::TcpListener(Socket socket, std::string address, absl::Duration call_timeout)
    : socket_(std::move(socket)), address_(std::move(address)), call_timeout_(call_timeout) {}

absl::StatusOr<std::unique_ptr<Communicator>> TcpListener::Join(int64_t epoch, int rank,
                                                                std::vector<std::string> addresses,
                                                                absl::Time deadline) {
  const int world_size = static_cast<int>(addresses.size());
  if (rank < 0 || rank >= world_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("rank ", rank, " of a group of ", world_size, " addresses"));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<TcpCommunicator> communicator,
                   TcpCommunicator::Create(rank, world_size, call_timeout_));
  {
    absl::MutexLock lock(&mutex_);
    joining_ = communicator.get();
    joining_epoch_ = epoch;
    if (aborted_epoch_ == epoch) joining_->Abort(abort_);
  }
  const absl::Status status =
      communicator->Connect({.epoch = epoch, .rank = rank, .addresses = std::move(addresses)},
                            socket_, After(deadline - absl::Now()));
  {
    absl::MutexLock lock(&mutex_);
    joining_ = nullptr;
    if (aborted_epoch_ == epoch) aborted_epoch_.reset();
  }
  RETURN_IF_ERROR(status);
  return communicator;
}

void TcpListener::Abort(int64_t epoch, const absl::Status& why) {
  absl::MutexLock lock(&mutex_);
  if (aborted_epoch_ == epoch) return;
  aborted_epoch_ = epoch;
  abort_ = why;
  if (joining_ != nullptr && joining_epoch_ == epoch) joining_->Abort(why);
}

std::string TcpListener::waiting_in() const {
  absl::MutexLock lock(&mutex_);
  return joining_ == nullptr ? "" : joining_->waiting_in();
}

}  // namespace latentd
