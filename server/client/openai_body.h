#ifndef LATENTD_SERVER_CLIENT_OPENAI_BODY_H_
#define LATENTD_SERVER_CLIENT_OPENAI_BODY_H_

#include "latentd/v1/inference.pb.h"
#include "server/client/json_fields.h"

// The bodies of OpenAI's HTTP API as requests of latentd.
//
// Every field that the server has is taken under the name that it has there; those that OpenAI does
// not have, under the name that vLLM gives them (top_k, min_p, repetition_penalty, min_tokens,
// stop_token_ids, ignore_eos, include_stop_str_in_output, skip_special_tokens, return_token_ids,
// truncate_prompt_tokens, allowed_token_ids, chat_template, chat_template_kwargs,
// continue_final_message, structured_outputs, prompt_logprobs, add_special_tokens, cache_salt), and
// DeepSeek's `thinking`. Every other field is an error: a batch job that leaves out what was asked
// for would be found out hours later. Ranges are the server's to check.

namespace latentd {

// Of POST /v1/chat/completions.
void ReadChatBody(const JsonFields::Json& body, std::vector<std::string>* errors,
                  v1::ChatRequest* request);

// Of POST /v1/completions. Without max_tokens 16, as OpenAI says. One prompt: a list of several
// would be several answers.
void ReadCompletionBody(const JsonFields::Json& body, std::vector<std::string>* errors,
                        v1::CompleteRequest* request);

}  // namespace latentd

#endif  // LATENTD_SERVER_CLIENT_OPENAI_BODY_H_
