// NcclCommunicator of a program that was built without nccl.h.

#include "engine/comm/nccl_communicator.h"

namespace latentd {
namespace {

absl::Status Absent() {
  return absl::UnavailableError(
      "no NCCL: this program was built without nccl.h (scripts/setup --cuda, then build again)");
}

}  // namespace

absl::StatusOr<std::string> NcclCommunicator::MakeUniqueId() { return Absent(); }

absl::StatusOr<std::unique_ptr<NcclCommunicator>> NcclCommunicator::Create(int, int,
                                                                           const std::string&) {
  return Absent();
}

}  // namespace latentd
