#include "server/wire.h"

#include <cstdint>

#include "absl/strings/str_cat.h"
#include "grpcpp/support/slice.h"
#include "server/status.h"

namespace latentd {

grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message) {
  grpc::Slice slice(message.ByteSizeLong());
  message.SerializeWithCachedSizesToArray(const_cast<uint8_t*>(slice.begin()));
  return grpc::ByteBuffer(&slice, 1);
}

absl::Status MalformedMessage(const google::protobuf::Descriptor& type) {
  return MakeError(absl::StatusCode::kInvalidArgument, "MALFORMED_MESSAGE",
                   absl::StrCat("the message is no ", type.full_name(),
                                ": cut short, garbled, or a string is not UTF-8"),
                   {{"type", type.full_name()}});
}

}  // namespace latentd
