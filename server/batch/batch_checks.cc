#include "server/batch/batch_checks.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "server/request_builder.h"
#include "server/request_checks.h"

namespace latentd {
namespace {

constexpr absl::Duration kDefaultWindow = absl::Hours(24);
constexpr int32_t kDefaultAttempts = 5;
constexpr int32_t kMaxAttempts = 100;
constexpr size_t kMaxCustomIdBytes = 256;

struct DurationRange {
  absl::Duration low, high;
};
constexpr DurationRange kWindow = {absl::Seconds(1), absl::Hours(30 * 24)};
constexpr DurationRange kResultTtl = {absl::Minutes(1), absl::Hours(365 * 24)};

void CheckDuration(const google::protobuf::Duration& proto, DurationRange range,
                   const std::string& field, RequestErrors* errors) {
  constexpr int64_t kMaxSeconds = 315'576'000'000;  // what a protobuf Duration may hold
  const bool valid = proto.seconds() >= 0 && proto.seconds() <= kMaxSeconds && proto.nanos() >= 0 &&
                     proto.nanos() <= 999'999'999;
  const absl::Duration duration = absl::Seconds(proto.seconds()) + absl::Nanoseconds(proto.nanos());
  if (valid && duration >= range.low && duration <= range.high) return;
  errors->Invalid(field, absl::StrCat("is ", proto.seconds(), " s and ", proto.nanos(),
                                      " ns; must be in [", absl::FormatDuration(range.low), ", ",
                                      absl::FormatDuration(range.high), "]"));
}

void SetDuration(absl::Duration duration, google::protobuf::Duration* proto) {
  proto->set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto->set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
}

void CheckSpec(const v1::JobSpec& spec, const std::string& prefix, RequestErrors* errors) {
  const auto field = [&prefix](absl::string_view name) { return absl::StrCat(prefix, name); };
  if (spec.has_completion_window()) {
    CheckDuration(spec.completion_window(), kWindow, field("completion_window"), errors);
  }
  CheckPriority(spec.priority(), field("priority"), errors);
  if (spec.has_max_attempts_per_item() &&
      (spec.max_attempts_per_item() < 1 || spec.max_attempts_per_item() > kMaxAttempts)) {
    errors->Invalid(
        field("max_attempts_per_item"),
        absl::StrCat("is ", spec.max_attempts_per_item(), "; must be in [1, ", kMaxAttempts, "]"));
  }
  if (spec.has_result_ttl()) {
    CheckDuration(spec.result_ttl(), kResultTtl, field("result_ttl"), errors);
  }
  CheckMetadata(spec.metadata(), field("metadata"), errors);
}

void FillDefaults(const ServedModel& model, const BatchLimits& limits, v1::JobSpec* spec) {
  if (spec->model().empty()) spec->set_model(model.name);
  if (!spec->has_completion_window()) {
    SetDuration(kDefaultWindow, spec->mutable_completion_window());
  }
  if (!spec->has_max_attempts_per_item()) spec->set_max_attempts_per_item(kDefaultAttempts);
  if (!spec->has_result_ttl()) SetDuration(limits.result_ttl, spec->mutable_result_ttl());
}

// What a request in a job may not say, online or not.
void CheckJobsOwn(const std::string& model_name, const v1::Serving& serving,
                  const std::string& prefix, const ServedModel& model, RequestErrors* errors) {
  if (!model_name.empty() && model_name != model.name) {
    errors->Invalid(absl::StrCat(prefix, "model"),
                    absl::StrCat("is ", model_name, "; ", model.name, " is served"));
  }
  if (serving.has_priority()) {
    errors->Invalid(absl::StrCat(prefix, "serving.priority"), "is the job's");
  }
  if (serving.has_queue_timeout()) {
    errors->Invalid(absl::StrCat(prefix, "serving.queue_timeout"),
                    "is not for items; the job has its completion_window");
  }
}

void CheckRequest(const v1::BatchItem& item, const std::string& prefix, const ServedModel& model,
                  const BatchLimits& limits, RequestErrors* errors) {
  if (item.has_chat()) {
    const std::string path = absl::StrCat(prefix, "chat.");
    CheckJobsOwn(item.chat().model(), item.chat().serving(), path, model, errors);
    CheckChat(item.chat(), model, path, errors);
    if (item.chat().has_chat_template() && !limits.allow_request_chat_template) {
      errors->Invalid(absl::StrCat(path, "chat_template"),
                      "is not taken from requests by this server");
    }
    if (model.chat_template == nullptr && !item.chat().has_chat_template()) {
      errors->Invalid(absl::StrCat(prefix, "chat"),
                      "needs a chat template, which the model has not; use complete");
    }
  } else if (item.has_complete()) {
    const std::string path = absl::StrCat(prefix, "complete.");
    CheckJobsOwn(item.complete().model(), item.complete().serving(), path, model, errors);
    CheckCompletion(item.complete(), model, path, errors);
  } else {
    errors->Invalid(absl::StrCat(prefix, "request"), "is not set; must be chat or complete");
  }
}

}  // namespace

absl::StatusOr<v1::CreateJobRequest::Header> CheckHeader(v1::CreateJobRequest::Header header,
                                                         const ServedModel& model,
                                                         const BatchLimits& limits) {
  RequestErrors errors;
  if (header.request_id().empty()) errors.Invalid("header.request_id", "is not set");
  CheckRequestId(header.request_id(), "header.request_id", &errors);
  CheckSpec(header.spec(), "header.spec.", &errors);
  if (header.first_item() < 0) {
    errors.Invalid("header.first_item",
                   absl::StrCat("is ", header.first_item(), "; must be at least 0"));
  }
  RETURN_IF_ERROR(errors.ToStatus());
  RETURN_IF_ERROR(CheckModelName(header.spec().model(), model));
  FillDefaults(model, limits, header.mutable_spec());
  return header;
}

absl::Status CheckKey(const std::string& request_id) {
  RequestErrors errors;
  if (request_id.empty()) errors.Invalid("request_id", "is not set");
  CheckRequestId(request_id, "request_id", &errors);
  return errors.ToStatus();
}

std::string CheckItem(std::string_view bytes, int64_t index, const ServedModel& model,
                      const BatchLimits& limits, std::vector<FieldViolation>* violations) {
  const std::string path = absl::StrCat("items[", index, "]");
  const int64_t size = static_cast<int64_t>(bytes.size());
  if (size > limits.max_item_bytes) {
    violations->push_back(
        {path, absl::StrCat("has ", size, " bytes; at most ", limits.max_item_bytes)});
    return "";
  }
  v1::BatchItem item;
  if (!item.ParseFromArray(bytes.data(), static_cast<int>(size))) {
    violations->push_back({path, "is no BatchItem: garbled, or a string is not UTF-8"});
    return "";
  }
  const std::string prefix = absl::StrCat(path, ".");
  RequestErrors errors;
  if (item.custom_id().empty() || item.custom_id().size() > kMaxCustomIdBytes) {
    errors.Invalid(absl::StrCat(prefix, "custom_id"),
                   absl::StrCat("has ", item.custom_id().size(), " bytes; must have 1 to ",
                                kMaxCustomIdBytes));
  }
  CheckRequest(item, prefix, model, limits, &errors);
  for (const auto* list : {&errors.invalid(), &errors.unimplemented()}) {
    violations->insert(violations->end(), list->begin(), list->end());
  }
  return std::move(*item.mutable_custom_id());
}

}  // namespace latentd
