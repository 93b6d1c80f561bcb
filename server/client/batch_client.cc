#include "server/client/batch_client.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <ostream>

#include "absl/time/clock.h"
#include "engine/status.h"

namespace latentd {
namespace {

// How long a server that has answered before may be gone.
constexpr double kOutageSeconds = 60;
constexpr absl::Duration kLongStream = absl::Seconds(5);
constexpr absl::Duration kFirstPause = absl::Milliseconds(100);
constexpr absl::Duration kLongestPause = absl::Seconds(2);

}  // namespace

BatchClient::BatchClient(const BatchConnection& options, const Interrupts& interrupts,
                         std::ostream& err)
    : options_(options.connection),
      owner_(options.owner),
      interrupts_(interrupts),
      err_(err),
      channel_(MakeChannel(options_)),
      stub_(v1::BatchService::NewStub(channel_)) {}

void BatchClient::Prepare(grpc::ClientContext* context) const {
  if (!owner_.empty()) context->AddMetadata("latentd-owner", owner_);
}

bool BatchClient::TryAgain(const grpc::Status& status) {
  if (status.error_code() != grpc::StatusCode::UNAVAILABLE) return false;
  on_retry_();
  if (answered_ && !options_.wait_s) options_.wait_s = kOutageSeconds;
  if (!wait_) wait_.emplace(options_, *channel_, interrupts_, err_);
  // A server that takes calls and fails them all must not be asked without pause.
  if (failures_++ > 0) {
    const absl::Duration pause = kFirstPause * (1 << std::min(failures_ - 2, 5));
    if (interrupts_.Sleep(std::min(pause, kLongestPause))) return false;
  }
  return wait_->TryAgain(status);
}

void BatchClient::Progressed() {
  answered_ = true;
  failures_ = 0;
  wait_.reset();
}

void BatchClient::StreamEnded(absl::Time start) {
  if (absl::Now() - start > kLongStream) Progressed();
}

std::string SerializeDeterministic(const google::protobuf::MessageLite& message) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    LATENTD_CHECK(message.SerializeToCodedStream(&coded));
  }
  return bytes;
}

std::string JsonLine(const google::protobuf::Message& message) {
  google::protobuf::util::JsonPrintOptions options;
  options.preserve_proto_field_names = true;
  std::string line;
  // Fails on nothing that a parsed message of ours can hold.
  LATENTD_CHECK(google::protobuf::util::MessageToJsonString(message, &line, options).ok());
  return line;
}

}  // namespace latentd
