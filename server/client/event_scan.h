#ifndef LATENTD_SERVER_CLIENT_EVENT_SCAN_H_
#define LATENTD_SERVER_CLIENT_EVENT_SCAN_H_

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <optional>

#include "latentd/v1/inference.pb.h"

namespace latentd {

// What a load generator wants to know of a GenerationEvent.
struct ScannedEvent {
  enum class Kind { kOther, kStarted, kDelta, kFinished, kUsage };

  Kind kind = Kind::kOther;
  int64_t num_token_ids = 0;       // kDelta
  std::optional<v1::Usage> usage;  // kUsage
};

// Reads a serialised GenerationEvent without building it: deltas are nearly all of a stream, and of
// a delta only the number of its token ids counts. None when the bytes are no GenerationEvent.
std::optional<ScannedEvent> ScanEvent(const grpc::ByteBuffer& buffer);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_EVENT_SCAN_H_
