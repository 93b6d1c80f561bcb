#ifndef LATENTD_SERVER_REQUEST_BUILDER_H_
#define LATENTD_SERVER_REQUEST_BUILDER_H_

#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "latentd/v1/inference.pb.h"
#include "scheduler/request.h"
#include "server/answer.h"
#include "server/request_checks.h"
#include "server/served_model.h"
#include "server/text/chat_template.h"

// From a protobuf request to one that the core can run. Every field is checked before any work is
// done; all violations are told at once. Pure functions; any thread; long prompts take tens of
// milliseconds.

namespace latentd {

// A checked request.
struct GenerationRequest {
  Request core;  // its id is still 0
  AnswerSpec answer;
  std::string request_id;  // the client's, or one made here
  std::map<std::string, std::string> metadata;
  absl::Duration queue_timeout = absl::InfiniteDuration();
  bool send_token_ids = false;
  std::string echo;  // text that goes before the answer
};

// NOT_FOUND unless `name` is empty or the model's.
absl::Status CheckModelName(absl::string_view name, const ServedModel& model);

// What can be told of a request's fields without its template and the tokenizer: all but `model`,
// and whether a template of its own is allowed. Microseconds. `prefix` goes before every field's
// name, such as "items[17].chat.".
void CheckChat(const v1::ChatRequest& proto, const ServedModel& model, const std::string& prefix,
               RequestErrors* errors);
void CheckCompletion(const v1::CompleteRequest& proto, const ServedModel& model,
                     const std::string& prefix, RequestErrors* errors);

// INVALID_ARGUMENT, UNIMPLEMENTED, PERMISSION_DENIED as inference.proto says.
absl::StatusOr<GenerationRequest> BuildChat(const v1::ChatRequest& proto, const ServedModel& model,
                                            bool allow_request_chat_template);
absl::StatusOr<GenerationRequest> BuildCompletion(const v1::CompleteRequest& proto,
                                                  const ServedModel& model);
absl::StatusOr<RenderedChat> RenderChat(const v1::RenderChatRequest& proto,
                                        const ServedModel& model, bool allow_request_chat_template);
absl::StatusOr<std::vector<TokenId>> TokenizeText(const v1::TokenizeRequest& proto,
                                                  const ServedModel& model);
absl::StatusOr<std::string> DetokenizeIds(const v1::DetokenizeRequest& proto,
                                          const ServedModel& model);

}  // namespace latentd

#endif  // LATENTD_SERVER_REQUEST_BUILDER_H_
