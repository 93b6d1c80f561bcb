#include "server/client/workload.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/support/slice.h>

#include <algorithm>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "engine/status.h"

namespace latentd {
namespace {

// Streams of Random: one for each use, so that a change of one option moves nothing else.
constexpr uint64_t kPrefixStream = 0x50524546'00000000;

grpc::ByteBuffer Serialize(const google::protobuf::MessageLite& message) {
  const grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace

absl::StatusOr<Workload> Workload::Make(const BenchOptions& options, const v1::Model& model) {
  Workload workload;
  workload.options_ = options;
  workload.vocab_size_ = model.vocab_size();
  workload.max_model_len_ = model.max_model_len();
  if (workload.vocab_size_ < 1 || workload.max_model_len_ < 2) {
    return absl::FailedPreconditionError(
        absl::StrCat("the server's model '", model.name(), "' has vocab_size ", model.vocab_size(),
                     " and max_model_len ", model.max_model_len()));
  }
  ASSIGN_OR_RETURN(workload.prompt_tokens_,
                   TokenCount::Parse("--prompt-tokens", options.prompt_tokens));
  if (!options.output_tokens.empty()) {
    ASSIGN_OR_RETURN(workload.output_tokens_,
                     TokenCount::Parse("--output-tokens", options.output_tokens));
  }
  const bool chat = !options.prompts.empty();
  if (chat) {
    RETURN_IF_ERROR(workload.ReadPrompts(options.prompts));
  } else {
    RETURN_IF_ERROR(workload.CheckLengths());
    Random random(options.seed, kPrefixStream);
    workload.prefix_.resize(workload.max_model_len_);
    for (int32_t& id : workload.prefix_) id = random.Below(workload.vocab_size_);
  }
  workload.method_ = absl::StrCat("/latentd.v1.InferenceService/", options.unary ? "" : "Stream",
                                  chat ? "Chat" : "Complete");
  return workload;
}

absl::Status Workload::CheckLengths() const {
  // What an unbounded distribution draws is cut to what is left; fixed lengths have to fit.
  const int64_t prompt = prompt_tokens_.max().value_or(prompt_tokens_.min());
  const int64_t output = output_tokens_->max().value_or(output_tokens_->min());
  if (prompt + output > max_model_len_) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--prompt-tokens ", options_.prompt_tokens, " and --output-tokens ", options_.output_tokens,
        " need up to ", prompt + output, " tokens; the model's max_model_len is ", max_model_len_));
  }
  return absl::OkStatus();
}

absl::Status Workload::ReadPrompts(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat("--prompts: cannot open ", path));
  std::string line;
  for (int number = 1; std::getline(file, line); ++number) {
    if (line.ends_with('\r')) line.pop_back();
    if (line.empty()) continue;
    v1::ChatRequest chat;
    if (line.starts_with('{')) {
      const auto parsed = google::protobuf::util::JsonStringToMessage(line, &chat);
      if (!parsed.ok()) {
        return absl::InvalidArgumentError(absl::StrCat("--prompts: line ", number, " of ", path,
                                                       " is no ChatRequest: ", parsed.ToString()));
      }
    } else {
      v1::Message* message = chat.add_messages();
      message->set_role(v1::ROLE_USER);
      message->set_content(line);
    }
    chats_.push_back(std::move(chat));
  }
  if (chats_.empty())
    return absl::InvalidArgumentError(absl::StrCat("--prompts: ", path, " is empty"));
  return absl::OkStatus();
}

Workload::Item Workload::At(int64_t index) const {
  return chats_.empty() ? RandomPrompt(index) : Chat(index);
}

Workload::Item Workload::RandomPrompt(int64_t index) const {
  Random random(options_.seed, index);
  Item item;
  const int64_t longest_output =
      max_model_len_ - prompt_tokens_.max().value_or(prompt_tokens_.min());
  item.output_tokens = output_tokens_->Sample(random, longest_output);
  item.prompt_tokens = prompt_tokens_.Sample(random, max_model_len_ - item.output_tokens);

  v1::CompleteRequest request;
  request.set_model(options_.model);
  auto& ids = *request.mutable_tokens()->mutable_ids();
  ids.Reserve(static_cast<int>(item.prompt_tokens));
  const auto shared =
      static_cast<int64_t>(options_.prefix_share * static_cast<double>(item.prompt_tokens));
  ids.Add(prefix_.begin(), prefix_.begin() + shared);
  while (ids.size() < item.prompt_tokens) {
    ids.Add(static_cast<int32_t>(random.Below(vocab_size_)));
  }
  v1::Limits& limits = *request.mutable_limits();
  limits.set_max_tokens(static_cast<int32_t>(item.output_tokens));
  limits.set_ignore_eos(true);
  request.mutable_sampling()->set_seed(random.Next());
  if (options_.temperature) request.mutable_sampling()->set_temperature(*options_.temperature);
  request.mutable_outputs()->set_token_ids(options_.token_ids);
  request.mutable_serving()->set_cache_salt(options_.cache_salt);
  item.request = Serialize(request);
  return item;
}

Workload::Item Workload::Chat(int64_t index) const {
  Random random(options_.seed, index);
  Item item;
  const auto size = static_cast<int64_t>(chats_.size());
  v1::ChatRequest request = chats_[((index % size) + size) % size];
  if (!options_.model.empty()) request.set_model(options_.model);
  if (output_tokens_) {
    item.output_tokens = output_tokens_->Sample(random, max_model_len_ - 1);
    request.mutable_limits()->set_max_tokens(static_cast<int32_t>(item.output_tokens));
    request.mutable_limits()->set_ignore_eos(true);
  }
  v1::Sampling& sampling = *request.mutable_sampling();
  if (!sampling.has_seed()) sampling.set_seed(random.Next());
  if (options_.temperature) sampling.set_temperature(*options_.temperature);
  request.mutable_outputs()->set_token_ids(options_.token_ids);
  if (request.serving().cache_salt().empty())
    request.mutable_serving()->set_cache_salt(options_.cache_salt);
  item.request = Serialize(request);
  return item;
}

}  // namespace latentd
