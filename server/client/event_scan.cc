#include "server/client/event_scan.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/wire_format_lite.h>
#include <grpcpp/support/slice.h>

#include <algorithm>
#include <vector>

namespace latentd {
namespace {

using google::protobuf::internal::WireFormatLite;
using google::protobuf::io::CodedInputStream;
using v1::GenerationEvent;

// Number of varints in `bytes`: each ends with the one byte whose high bit is clear.
int64_t CountVarints(const uint8_t* bytes, size_t size) {
  return std::count_if(bytes, bytes + size, [](uint8_t byte) { return byte < 0x80; });
}

// Counts the token ids of a Delta, packed (as proto3 writes them) or not.
bool CountTokenIds(const uint8_t* bytes, int size, int64_t* count) {
  CodedInputStream input(bytes, size);
  while (const uint32_t tag = input.ReadTag()) {
    const int field = WireFormatLite::GetTagFieldNumber(tag);
    const bool packed =
        WireFormatLite::GetTagWireType(tag) == WireFormatLite::WIRETYPE_LENGTH_DELIMITED;
    if (field == GenerationEvent::Delta::kTokenIdsFieldNumber && packed) {
      int length = 0;
      if (!input.ReadVarintSizeAsInt(&length)) return false;
      const uint8_t* begin = bytes + input.CurrentPosition();
      if (!input.Skip(length)) return false;
      *count += CountVarints(begin, length);
      continue;
    }
    if (field == GenerationEvent::Delta::kTokenIdsFieldNumber) ++*count;
    if (!WireFormatLite::SkipField(&input, tag)) return false;
  }
  return input.ConsumedEntireMessage();
}

std::optional<ScannedEvent> Scan(const uint8_t* bytes, size_t size) {
  ScannedEvent event;
  CodedInputStream input(bytes, static_cast<int>(size));
  while (const uint32_t tag = input.ReadTag()) {
    if (WireFormatLite::GetTagWireType(tag) != WireFormatLite::WIRETYPE_LENGTH_DELIMITED) {
      if (!WireFormatLite::SkipField(&input, tag)) return std::nullopt;
      continue;
    }
    int length = 0;
    if (!input.ReadVarintSizeAsInt(&length)) return std::nullopt;
    const uint8_t* begin = bytes + input.CurrentPosition();
    if (!input.Skip(length)) return std::nullopt;
    switch (WireFormatLite::GetTagFieldNumber(tag)) {
      case GenerationEvent::kStartedFieldNumber:
        event.kind = ScannedEvent::Kind::kStarted;
        break;
      case GenerationEvent::kDeltaFieldNumber:
        event.kind = ScannedEvent::Kind::kDelta;
        if (!CountTokenIds(begin, length, &event.num_token_ids)) return std::nullopt;
        break;
      case GenerationEvent::kFinishedFieldNumber:
        event.kind = ScannedEvent::Kind::kFinished;
        break;
      case GenerationEvent::kUsageFieldNumber:
        event.kind = ScannedEvent::Kind::kUsage;
        if (!event.usage.emplace().ParseFromArray(begin, length)) return std::nullopt;
        break;
      default:
        break;
    }
  }
  if (!input.ConsumedEntireMessage()) return std::nullopt;
  return event;
}

}  // namespace

std::optional<ScannedEvent> ScanEvent(const grpc::ByteBuffer& buffer) {
  grpc::Slice slice;
  // A small message lies in one slice, and is read where it lies.
  if (!buffer.TrySingleSlice(&slice).ok() && !buffer.DumpToSingleSlice(&slice).ok()) {
    return std::nullopt;
  }
  return Scan(slice.begin(), slice.size());
}

}  // namespace latentd
