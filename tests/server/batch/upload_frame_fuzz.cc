// What the frame cutter makes of any bytes: it refuses them, or its items are those that protobuf
// finds.

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "engine/status.h"
#include "latentd/v1/batch.pb.h"
#include "server/batch/upload_frame.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  auto frame = latentd::UploadFrame::Cut(bytes);
  if (!frame.ok()) return 0;
  latentd::v1::CreateJobRequest parsed;
  const bool parses = parsed.ParseFromArray(data, static_cast<int>(size));
  using Kind = latentd::UploadFrame::Kind;
  if (frame->kind() != Kind::kItems) {
    LATENTD_CHECK(parses);
    LATENTD_CHECK(parsed.has_header() == (frame->kind() == Kind::kHeader));
    return 0;
  }
  int count = 0;
  while (const auto item = frame->NextItem()) {
    latentd::v1::BatchItem alone;
    const bool item_parses = alone.ParseFromArray(item->data(), static_cast<int>(item->size()));
    if (parses) {  // else a later item, or this one, is what it fails at
      LATENTD_CHECK(item_parses);
      LATENTD_CHECK(count < parsed.items().items_size());
      LATENTD_CHECK(alone.SerializeAsString() == parsed.items().items(count).SerializeAsString());
    }
    ++count;
  }
  if (parses) LATENTD_CHECK(count == parsed.items().items_size());
  return 0;
}
