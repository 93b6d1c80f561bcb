#include "server/batch/upload_frame.h"

#include <cstdint>
#include <string>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/status.h"
#include "server/wire.h"

namespace latentd {
namespace {

// One field of a message's wire form.
struct WireField {
  uint32_t number = 0;
  bool is_bytes = false;  // a message, a string
  std::string_view body;  // of is_bytes
};

bool TakeVarint(std::string_view* bytes, uint64_t* value) {
  *value = 0;
  for (int i = 0; i < 10 && !bytes->empty(); ++i) {
    const uint8_t byte = static_cast<uint8_t>(bytes->front());
    bytes->remove_prefix(1);
    if (i == 9 && byte > 1) return false;  // more than 64 bits
    *value |= static_cast<uint64_t>(byte & 0x7F) << (7 * i);
    if ((byte & 0x80) == 0) return true;
  }
  return false;
}

// Takes the next field off `bytes`; false where there is none. Groups, which proto3 has not, are
// refused.
bool TakeField(std::string_view* bytes, WireField* field) {
  uint64_t tag = 0;
  if (!TakeVarint(bytes, &tag) || tag > UINT32_MAX || tag >> 3 == 0) return false;
  *field = {.number = static_cast<uint32_t>(tag >> 3), .is_bytes = false, .body = {}};
  uint64_t size = 0;
  switch (tag & 7) {
    case 0:
      return TakeVarint(bytes, &size);
    case 1:
      size = 8;
      break;
    case 2:
      if (!TakeVarint(bytes, &size)) return false;
      field->is_bytes = true;
      break;
    case 5:
      size = 4;
      break;
    default:
      return false;
  }
  if (size > bytes->size()) return false;
  if (field->is_bytes) field->body = bytes->substr(0, size);
  bytes->remove_prefix(size);
  return true;
}

// Whether every field of a message can be taken.
bool IsWhole(std::string_view bytes) {
  WireField field;
  while (!bytes.empty()) {
    if (!TakeField(&bytes, &field)) return false;
  }
  return true;
}

absl::Status Malformed() { return MalformedMessage(*v1::CreateJobRequest::descriptor()); }

absl::Status BadFrame(absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, "BAD_FRAME", message);
}

}  // namespace

absl::StatusOr<UploadFrame> UploadFrame::Cut(std::string_view bytes) {
  UploadFrame frame;
  std::string_view rest = bytes;
  std::optional<Kind> kind;
  while (!rest.empty()) {
    const std::string_view here = rest;
    WireField field;
    if (!TakeField(&rest, &field)) return Malformed();
    if (!field.is_bytes || field.number < 1 || field.number > 3) continue;
    const Kind found = static_cast<Kind>(field.number - 1);
    if (kind.has_value() && (*kind != found || found != Kind::kItems)) {
      return BadFrame("the message has more than one of header, items and commit");
    }
    if (!kind.has_value() && found == Kind::kItems) frame.rest_ = here;
    kind = found;
    RETURN_IF_ERROR(frame.SetBody(found, field.body));
  }
  if (!kind.has_value()) return BadFrame("the message has none of header, items and commit");
  frame.kind_ = *kind;
  return frame;
}

absl::Status UploadFrame::SetBody(Kind kind, std::string_view body) {
  const int size = static_cast<int>(body.size());  // gRPC's messages are below 2 GiB
  bool ok = false;
  switch (kind) {
    case Kind::kHeader:
      ok = header_.ParseFromArray(body.data(), size);
      break;
    case Kind::kItems:
      ok = IsWhole(body);
      break;
    case Kind::kCommit:
      ok = commit_.ParseFromArray(body.data(), size);
      break;
  }
  return ok ? absl::OkStatus() : Malformed();
}

std::optional<std::string_view> UploadFrame::NextItem() {
  WireField field;
  while (true) {
    while (!items_.empty()) {
      LATENTD_CHECK(TakeField(&items_, &field));  // Cut has been over it
      if (field.is_bytes && field.number == 1) return field.body;
    }
    if (rest_.empty()) return std::nullopt;
    LATENTD_CHECK(TakeField(&rest_, &field));
    if (field.is_bytes && field.number == 2) items_ = field.body;
  }
}

}  // namespace latentd
