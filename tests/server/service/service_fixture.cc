#include "tests/server/service/service_fixture.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "google/rpc/status.pb.h"

namespace latentd {

std::shared_ptr<const ServedModel> DemoModel() {
  static const auto* const model = [] {
    auto served = std::make_shared<ServedModel>();
    served->name = "demo";
    served->architecture = "DeepseekV3ForCausalLM";
    served->max_model_len = 8192;
    served->vocab_size = 4096;
    served->kv_cache_tokens = 256 * kBlockSize;
    served->defaults.temperature = 0.6f;
    served->defaults.top_p = 0.95f;
    served->defaults.eos_token_ids = {1};
    served->tokenizer = *Tokenizer::Load("deploy/demo-model");
    served->chat_template =
        *ChatTemplate::Compile(served->tokenizer->chat_template(), served->tokenizer);
    return new std::shared_ptr<const ServedModel>(std::move(served));
  }();
  return *model;
}

std::vector<TokenId> Ids(const std::string& text) {
  return *DemoModel()->tokenizer->Encode(text, /*parse_control_tokens=*/true);
}

EngineInfo DemoEngineInfo() {
  return {.num_blocks = 256,
          .num_dp_ranks = 1,
          .max_step_tokens = 512,
          .max_sequences = 64,
          .max_model_len = 8192,
          .vocab_size = 4096};
}

// ---- RecordingObserver -------------------------------------------------------------------------

void RecordingObserver::OnFinished(const RequestRecord& record) {
  absl::MutexLock lock(&mutex_);
  records_.push_back(record);
}
void RecordingObserver::OnRejected(std::string_view reason) {
  absl::MutexLock lock(&mutex_);
  rejected_.emplace_back(reason);
}
void RecordingObserver::OnFirstToken(absl::Duration) {
  absl::MutexLock lock(&mutex_);
  ++num_first_tokens_;
}
void RecordingObserver::OnTokens(absl::Duration, int64_t count) {
  absl::MutexLock lock(&mutex_);
  num_further_tokens_ += count;
}

RequestRecord RecordingObserver::AwaitFinished(size_t count) {
  absl::MutexLock lock(&mutex_);
  const auto there = [&]()
                         ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) { return records_.size() >= count; };
  EXPECT_TRUE(mutex_.AwaitWithTimeout(absl::Condition(&there), absl::Seconds(10)));
  return records_.empty() ? RequestRecord{} : records_.back();
}
std::vector<std::string> RecordingObserver::rejected() const {
  absl::MutexLock lock(&mutex_);
  return rejected_;
}
int64_t RecordingObserver::num_first_tokens() const {
  absl::MutexLock lock(&mutex_);
  return num_first_tokens_;
}
int64_t RecordingObserver::num_further_tokens() const {
  absl::MutexLock lock(&mutex_);
  return num_further_tokens_;
}

// ---- ServiceUnderTest
// ----------------------------------------------------------------------------

ServiceUnderTest::ServiceUnderTest(Engine* engine, Options options)
    : options_(std::move(options)),
      service_(std::make_unique<InferenceService>(options_.service, &observer_)) {
  core_ = std::make_unique<EngineCore>(
      options_.scheduler, engine,
      EngineCore::Callbacks{.on_events =
                                [this](std::vector<SequenceEvent> events) {
                                  service_->HandleEvents(std::move(events));
                                },
                            .on_step = nullptr});
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(service_->grpc_service());
  builder.SetMaxReceiveMessageSize(1 << 20);
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
  stub_ = v1::InferenceService::NewStub(NewChannel());
  if (options_.load) Load();
}

ServiceUnderTest::~ServiceUnderTest() {
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  core_->Stop();
}

void ServiceUnderTest::Load() { service_->SetServing(options_.model, core_.get()); }

std::shared_ptr<grpc::Channel> ServiceUnderTest::NewChannel(grpc::ChannelArguments arguments) {
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // a connection of its own
  return grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), arguments);
}

// ---- a client
// -------------------------------------------------------------------------------------

std::string Streamed::content() const {
  std::string text;
  for (const auto& event : events) text += event.delta().content();
  return text;
}
std::string Streamed::reasoning() const {
  std::string text;
  for (const auto& event : events) text += event.delta().reasoning();
  return text;
}
int Streamed::num_deltas() const {
  int count = 0;
  for (const auto& event : events) count += event.has_delta();
  return count;
}
const v1::GenerationEvent::Started& Streamed::started() const { return events.front().started(); }
const v1::GenerationEvent::Finished& Streamed::finished() const {
  return events.at(events.size() - 2).finished();
}
const v1::Usage& Streamed::usage() const { return events.back().usage(); }

v1::ChatRequest UserSays(const std::string& text) {
  v1::ChatRequest request;
  auto* message = request.add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content(text);
  return request;
}

Streamed ReadAll(grpc::ClientReader<v1::GenerationEvent>& reader) {
  Streamed streamed;
  v1::GenerationEvent event;
  while (reader.Read(&event)) streamed.events.push_back(event);
  streamed.status = reader.Finish();
  return streamed;
}

Streamed StreamChat(v1::InferenceService::Stub& stub, const v1::ChatRequest& request) {
  grpc::ClientContext context;
  return ReadAll(*stub.StreamChat(&context, request));
}

Streamed StreamComplete(v1::InferenceService::Stub& stub, const v1::CompleteRequest& request) {
  grpc::ClientContext context;
  return ReadAll(*stub.StreamComplete(&context, request));
}

Error Explain(const grpc::Status& status) {
  Error error = {.code = status.error_code(),
                 .message = status.error_message(),
                 .reason = "",
                 .metadata = {},
                 .violations = {},
                 .retry_seconds = std::nullopt};
  google::rpc::Status proto;
  EXPECT_TRUE(proto.ParseFromString(status.error_details()));
  EXPECT_EQ(proto.code(), status.error_code());
  EXPECT_EQ(proto.message(), status.error_message());
  int num_infos = 0;
  for (const auto& any : proto.details()) {
    google::rpc::ErrorInfo info;
    google::rpc::BadRequest bad_request;
    google::rpc::RetryInfo retry;
    if (any.UnpackTo(&info)) {
      ++num_infos;
      EXPECT_EQ(info.domain(), "latentd");
      error.reason = info.reason();
      error.metadata.insert(info.metadata().begin(), info.metadata().end());
    } else if (any.UnpackTo(&bad_request)) {
      for (const auto& violation : bad_request.field_violations()) {
        error.violations[violation.field()] = violation.description();
      }
    } else if (any.UnpackTo(&retry)) {
      error.retry_seconds = retry.retry_delay().seconds() + retry.retry_delay().nanos() * 1e-9;
    } else {
      ADD_FAILURE() << "unknown detail " << any.type_url();
    }
  }
  EXPECT_EQ(num_infos, 1) << status.error_message();
  const bool must_retry = status.error_code() == grpc::StatusCode::UNAVAILABLE ||
                          status.error_code() == grpc::StatusCode::RESOURCE_EXHAUSTED;
  EXPECT_EQ(error.retry_seconds.has_value(), must_retry);
  return error;
}

bool Eventually(const std::function<bool()>& condition) {
  const absl::Time give_up = absl::Now() + absl::Seconds(10);
  while (!condition()) {
    if (absl::Now() > give_up) return false;
    absl::SleepFor(absl::Milliseconds(2));
  }
  return true;
}

}  // namespace latentd
