#ifndef LATENTD_SERVER_REQUEST_CHECKS_H_
#define LATENTD_SERVER_REQUEST_CHECKS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "latentd/v1/inference.pb.h"
#include "server/served_model.h"
#include "server/status.h"

// The ranges that inference.proto promises, one function a message. `prefix` is the message's own
// path, such as "sampling" or "chat.sampling".

namespace latentd {

// What is wrong with a request: fields out of range, and fields that are fine but not served.
class RequestErrors {
 public:
  void Invalid(std::string field, std::string description);
  void Unimplemented(std::string field);

  // OK; or INVALID_ARGUMENT with every violation; or, when all are in range, UNIMPLEMENTED with the
  // fields.
  absl::Status ToStatus() const;
  const std::vector<FieldViolation>& invalid() const { return invalid_; }
  const std::vector<FieldViolation>& unimplemented() const { return unimplemented_; }

 private:
  std::vector<FieldViolation> invalid_;
  std::vector<FieldViolation> unimplemented_;
};

// For RenderChat, which generates nothing, fields that are not served are no error.
enum class Purpose { kGenerate, kRender };

void CheckMessages(const v1::ChatRequest& chat, const std::string& prefix, RequestErrors* errors);
void CheckTools(const v1::ChatRequest& chat, const std::string& prefix, Purpose purpose,
                RequestErrors* errors);
void CheckResponseFormat(const v1::ResponseFormat& format, const std::string& prefix,
                         Purpose purpose, RequestErrors* errors);
void CheckSampling(const v1::Sampling& sampling, const ServedModel& model,
                   const std::string& prefix, Purpose purpose, RequestErrors* errors);
void CheckLimits(const v1::Limits& limits, const ServedModel& model, const std::string& prefix,
                 RequestErrors* errors);
void CheckOutputs(const v1::Outputs& outputs, bool is_chat, const std::string& prefix,
                  Purpose purpose, RequestErrors* errors);
void CheckServing(const v1::Serving& serving, const std::string& prefix, RequestErrors* errors);

// Ranges that other messages have too.
void CheckPriority(int32_t priority, const std::string& field, RequestErrors* errors);
// At most 128 bytes of printable ASCII.
void CheckRequestId(const std::string& request_id, const std::string& field, RequestErrors* errors);
void CheckMetadata(const google::protobuf::Map<std::string, std::string>& metadata,
                   const std::string& field, RequestErrors* errors);

// Every id in [0, vocab_size).
void CheckTokenIds(const google::protobuf::RepeatedField<int32_t>& ids, const ServedModel& model,
                   const std::string& field, RequestErrors* errors);

}  // namespace latentd

#endif  // LATENTD_SERVER_REQUEST_CHECKS_H_
