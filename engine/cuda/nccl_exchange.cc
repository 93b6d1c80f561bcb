#include "engine/cuda/nccl_exchange.h"

#include <utility>

#include "engine/comm/nccl_communicator.h"
#include "engine/status.h"

namespace latentd {
namespace {

class NcclExchange : public GpuExchange {
 public:
  explicit NcclExchange(std::unique_ptr<NcclCommunicator> communicator)
      : communicator_(std::move(communicator)) {}

  absl::Status Form(absl::Time deadline) override { return communicator_->Form(deadline); }
  absl::Status Dispatch(std::byte* slots, size_t bytes, cudaStream_t stream) override {
    return communicator_->AllGather(slots, bytes, stream);
  }
  absl::Status Combine(const __nv_bfloat16* sums, int64_t count, __nv_bfloat16* out,
                       cudaStream_t stream) override {
    return communicator_->ReduceScatterBf16(sums, out, count, stream);
  }
  bool capturable() const override { return true; }
  absl::Status Check() override { return communicator_->Check(); }
  void Abort(const absl::Status& why) override { communicator_->Abort(why); }
  std::string transport() const override {
    const std::string known = communicator_->transport();
    return known.empty() ? communicator_->version() : known;
  }
  std::string warning() const override { return communicator_->warning(); }

 private:
  const std::unique_ptr<NcclCommunicator> communicator_;
};

}  // namespace

ExchangeFactory NcclExchanges() {
  return [](const GroupSpec& group) -> absl::StatusOr<std::shared_ptr<GpuExchange>> {
    ASSIGN_OR_RETURN(std::unique_ptr<NcclCommunicator> communicator,
                     NcclCommunicator::Create(group.rank, group.world_size, group.nccl_unique_id));
    return std::make_shared<NcclExchange>(std::move(communicator));
  };
}

}  // namespace latentd
