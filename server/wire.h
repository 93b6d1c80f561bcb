#ifndef LATENTD_SERVER_WIRE_H_
#define LATENTD_SERVER_WIRE_H_

#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "google/protobuf/message.h"
#include "grpcpp/support/byte_buffer.h"
#include "grpcpp/support/proto_buffer_reader.h"

// Messages of the gRPC methods that are registered as raw: those hand us bytes. So a message that
// does not parse gets an error of ours (gRPC's own would be UNIMPLEMENTED without a word), and
// parsing a long one does not hold up a gRPC thread.

namespace latentd {

// The wire form of a message.
grpc::ByteBuffer Encode(const google::protobuf::MessageLite& message);

// INVALID_ARGUMENT, reason MALFORMED_MESSAGE: bytes that are none of this type.
absl::Status MalformedMessage(const google::protobuf::Descriptor& type);

template <typename Message>
absl::StatusOr<Message> Parse(const grpc::ByteBuffer& bytes) {
  grpc::ProtoBufferReader reader(const_cast<grpc::ByteBuffer*>(&bytes));
  Message message;
  if (reader.status().ok() && message.ParseFromZeroCopyStream(&reader)) return message;
  return MalformedMessage(*Message::descriptor());
}

}  // namespace latentd

#endif  // LATENTD_SERVER_WIRE_H_
