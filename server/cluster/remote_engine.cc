#include "server/cluster/remote_engine.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/plan_split.h"
#include "engine/status.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "server/cluster/plan_codec.h"

namespace latentd {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedOutputStream;

RemoteEngine::RemoteEngine(ClusterLeader* leader)
    : leader_(leader), info_(leader->info()), cache_epoch_(leader->formed_epoch()) {}

absl::StatusOr<StepResult> RemoteEngine::Execute(const StepPlan& plan) {
  const int64_t epoch = leader_->formed_epoch();
  absl::StatusOr<StepResult> result = RunStep(epoch, plan);
  cache_epoch_ = result.ok() ? epoch : 0;
  return result;
}

absl::StatusOr<StepResult> RemoteEngine::RunStep(int64_t epoch, const StepPlan& plan) {
  if (epoch == 0) return absl::CancelledError("the ranks are not in a group now");
  if (cache_epoch_ != 0 && cache_epoch_ != epoch) {
    return absl::CancelledError("the group was formed again since the last step");
  }
  SplitPlan(plan, info_.num_dp_ranks, &shares_);
  std::vector<grpc::ByteBuffer> messages;
  messages.reserve(shares_.size());
  for (const StepPlan& share : shares_) messages.push_back(EncodeStepMessage(epoch, share));
  RETURN_IF_ERROR(leader_->RunStep(epoch, plan.step, std::move(messages), &results_));
  for (size_t rank = 0; rank < shares_.size(); ++rank) {
    const absl::Status status = CheckResult(shares_[rank], results_[rank]);
    if (status.ok()) continue;
    const std::string what = absl::StrCat("step ", plan.step, ": ", status.message());
    leader_->RefuseResult(static_cast<int32_t>(rank), what);
    return absl::AbortedError(absl::StrCat("rank ", rank, ": ", what));
  }
  return MergeResults(plan, results_);
}

// What the rank's process answers is not believed more than what a client asks.
absl::Status RemoteEngine::CheckResult(const StepPlan& share, const StepResult& result) const {
  const auto num_samples =
      std::count_if(share.sequences.begin(), share.sequences.end(),
                    [](const SequenceStep& sequence) { return sequence.sample; });
  if (static_cast<size_t>(num_samples) != result.sampled.size()) {
    return absl::InternalError(
        absl::StrCat(result.sampled.size(), " tokens for ", num_samples, " sequences"));
  }
  for (const TokenId token : result.sampled) {
    if (token < 0 || token >= info_.vocab_size) {
      return absl::InternalError(
          absl::StrCat("token ", token, "; vocab_size is ", info_.vocab_size));
    }
  }
  if (result.device &&
      !(std::isfinite(result.device->busy_seconds) && std::isfinite(result.device->idle_seconds))) {
    return absl::InternalError("device times that are no numbers");
  }
  return absl::OkStatus();
}

// protobuf would copy the plan twice, from a string of its own into a string of ours. This is
// LeaderMessage{step: {epoch, plan}} by hand.
grpc::ByteBuffer EncodeStepMessage(int64_t epoch, const StepPlan& plan) {
  const size_t plan_size = EncodedPlanSize(plan);
  const auto tag_size = [](int field) {
    return CodedOutputStream::VarintSize32(static_cast<uint32_t>(field) << 3);
  };
  const size_t step_size = tag_size(v1::Step::kEpochFieldNumber) +
                           CodedOutputStream::VarintSize64(static_cast<uint64_t>(epoch)) +
                           tag_size(v1::Step::kPlanFieldNumber) +
                           CodedOutputStream::VarintSize64(plan_size) + plan_size;
  const size_t size = tag_size(v1::LeaderMessage::kStepFieldNumber) +
                      CodedOutputStream::VarintSize64(step_size) + step_size;
  grpc::Slice slice(size);
  uint8_t* begin = const_cast<uint8_t*>(slice.begin());
  uint8_t* out = begin;
  out = WireFormatLite::WriteTagToArray(v1::LeaderMessage::kStepFieldNumber,
                                        WireFormatLite::WIRETYPE_LENGTH_DELIMITED, out);
  out = CodedOutputStream::WriteVarint64ToArray(step_size, out);
  out = WireFormatLite::WriteInt64ToArray(v1::Step::kEpochFieldNumber, epoch, out);
  out = WireFormatLite::WriteTagToArray(v1::Step::kPlanFieldNumber,
                                        WireFormatLite::WIRETYPE_LENGTH_DELIMITED, out);
  out = CodedOutputStream::WriteVarint64ToArray(plan_size, out);
  EncodePlan(plan, reinterpret_cast<char*>(out));
  LATENTD_CHECK(out + plan_size == begin + size);
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace latentd
