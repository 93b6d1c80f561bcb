#ifndef LATENTD_SERVER_BATCH_UPLOAD_FRAME_H_
#define LATENTD_SERVER_BATCH_UPLOAD_FRAME_H_

#include <cstddef>
#include <optional>
#include <string_view>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "latentd/v1/batch.pb.h"

namespace latentd {

// One CreateJobRequest in its wire form. Items are cut out of it as the bytes that were sent: the
// chain of an upload is over those, which parsing and writing again need not give back.
//
// Fields that are unknown are skipped, as protobuf does; of header, items and commit a frame has
// one, and a field of those that is there twice is refused, items aside: theirs go on.
class UploadFrame {
 public:
  enum class Kind { kHeader, kItems, kCommit };

  // `bytes` must outlive the frame. INVALID_ARGUMENT, reason MALFORMED_MESSAGE or BAD_FRAME, unless
  // it is a frame; an item's own bytes may still be anything.
  static absl::StatusOr<UploadFrame> Cut(std::string_view bytes);

  Kind kind() const { return kind_; }
  // REQUIRES: of that kind.
  const v1::CreateJobRequest::Header& header() const { return header_; }
  const v1::CreateJobRequest::Commit& commit() const { return commit_; }
  // The next item's bytes; nullopt: there are no more. REQUIRES: kItems.
  std::optional<std::string_view> NextItem();

 private:
  UploadFrame() = default;
  absl::Status SetBody(Kind kind, std::string_view body);

  std::string_view rest_;   // of the frame, behind the Items that is being read
  std::string_view items_;  // the rest of that Items
  Kind kind_ = Kind::kItems;
  v1::CreateJobRequest::Header header_;
  v1::CreateJobRequest::Commit commit_;
};

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_UPLOAD_FRAME_H_
