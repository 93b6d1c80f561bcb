#ifndef LATENTD_SERVER_BATCH_BATCH_CHECKS_H_
#define LATENTD_SERVER_BATCH_BATCH_CHECKS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "latentd/v1/batch.pb.h"
#include "server/served_model.h"
#include "server/status.h"

// The ranges that batch.proto promises. Pure functions; any thread.

namespace latentd {

// What a daemon takes.
struct BatchLimits {
  int64_t max_item_bytes = int64_t{4} << 20;
  int64_t max_job_items = 1'000'000;
  int64_t max_jobs = 100;                            // of an owner, that have not ended
  int64_t max_items = 10'000'000;                    // likewise, without a result
  absl::Duration result_ttl = absl::Hours(30 * 24);  // where a job says nothing
  bool allow_request_chat_template = false;
};

// The header with the defaults filled in. INVALID_ARGUMENT with every violation, fields such as
// header.spec.priority; NOT_FOUND: it asks for a model that is not served.
absl::StatusOr<v1::CreateJobRequest::Header> CheckHeader(v1::CreateJobRequest::Header header,
                                                         const ServedModel& model,
                                                         const BatchLimits& limits);

// An idempotency key that must be there.
absl::Status CheckKey(const std::string& request_id);

// Appends what is wrong with the item of this index, as far as its bytes alone tell; returns its
// custom_id. Microseconds.
std::string CheckItem(std::string_view bytes, int64_t index, const ServedModel& model,
                      const BatchLimits& limits, std::vector<FieldViolation>* violations);

}  // namespace latentd

#endif  // LATENTD_SERVER_BATCH_BATCH_CHECKS_H_
