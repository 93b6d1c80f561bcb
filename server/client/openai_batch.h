#ifndef LATENTD_SERVER_CLIENT_OPENAI_BATCH_H_
#define LATENTD_SERVER_CLIENT_OPENAI_BATCH_H_

#include <string>
#include <vector>

#include "latentd/v1/batch.pb.h"
#include "server/client/json_fields.h"

// OpenAI's batch files, a JSON object a line.
//   input   {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
//   output  {"id": ..., "custom_id": "a", "response": {"status_code": 200, "request_id": ...,
//            "body": {...}}, "error": null}
//   errors  the same with another status code, or "response": null and
//           "error": {"code": "batch_expired", "message": ...}

namespace latentd {

// A parsed line of an input file as an item; openai_body.h says which fields a body may have. What
// is wrong goes to `*errors`, all of it; then `*item` is of no use.
void ReadOpenAiItem(const JsonFields::Json& line, std::vector<std::string>* errors,
                    v1::BatchItem* item);

// A result as a line of an output or an error file, without its end. The same result gives the same
// line: `created`, which OpenAI has of each answer, is when the job was made.
std::string OpenAiResult(const v1::Job& job, const v1::ItemResult& result);

// Whether OpenAI puts the result into the output file; else it is of the error file.
bool IsOpenAiOutput(const v1::ItemResult& result);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_OPENAI_BATCH_H_
