#include "engine/cpu/tcp_transport.h"

#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

class TcpTransport : public GroupTransport {
 public:
  explicit TcpTransport(std::unique_ptr<TcpListener> listener) : listener_(std::move(listener)) {}

  absl::StatusOr<std::unique_ptr<Communicator>> Connect(const GroupSpec& group,
                                                        absl::Time deadline) override {
    if (group.addresses.size() != static_cast<size_t>(group.world_size)) {
      return absl::InvalidArgumentError(absl::StrCat("group ", group.epoch, ": ",
                                                     group.addresses.size(), " addresses of ",
                                                     group.world_size, " ranks"));
    }
    return listener_->Join(group.epoch, group.rank, group.addresses, deadline);
  }
  void Abort(int64_t epoch, const absl::Status& why) override { listener_->Abort(epoch, why); }
  std::string waiting_in() const override { return listener_->waiting_in(); }
  std::string address() const override { return listener_->address(); }
  std::string name() const override { return "tcp"; }

 private:
  const std::unique_ptr<TcpListener> listener_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<GroupTransport>> MakeTcpTransport(
    const TcpListener::Options& options) {
  ASSIGN_OR_RETURN(std::unique_ptr<TcpListener> listener, TcpListener::Listen(options));
  return std::make_unique<TcpTransport>(std::move(listener));
}

}  // namespace latentd
