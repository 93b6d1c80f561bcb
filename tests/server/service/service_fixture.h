#ifndef LATENTD_TESTS_SERVER_SERVICE_SERVICE_FIXTURE_H_
#define LATENTD_TESTS_SERVER_SERVICE_SERVICE_FIXTURE_H_

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "google/rpc/error_details.pb.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "latentd/v1/inference.grpc.pb.h"
#include "scheduler/engine_core.h"
#include "server/inference_service.h"
#include "server/request_observer.h"
#include "server/served_model.h"
#include "tests/server/service/scripted_engine.h"

namespace latentd {

// The tokenizer and template of deploy/demo-model under the name "demo"; 8192 tokens, 4096 ids.
// Loaded once.
std::shared_ptr<const ServedModel> DemoModel();
// `text`, spelled control tokens included, as ids.
std::vector<TokenId> Ids(const std::string& text);
EngineInfo DemoEngineInfo();

// Keeps what it is told.
class RecordingObserver : public RequestObserver {
 public:
  void OnFinished(const RequestRecord& record) override;
  void OnRejected(std::string_view reason) override;
  void OnFirstToken(absl::Duration since_arrival) override;
  void OnTokens(absl::Duration since_last, int64_t count) override;

  // Waits for that many records in all; returns the last.
  RequestRecord AwaitFinished(size_t count);
  std::vector<std::string> rejected() const;
  int64_t num_first_tokens() const;
  int64_t num_further_tokens() const;

 private:
  mutable absl::Mutex mutex_;
  std::vector<RequestRecord> records_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::string> rejected_ ABSL_GUARDED_BY(mutex_);
  int64_t num_first_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  int64_t num_further_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
};

// Core, service and gRPC server over `engine`, in this process, and a client of it.
class ServiceUnderTest {
 public:
  struct Options {
    SchedulerConfig scheduler;
    ServiceOptions service;
    std::shared_ptr<const ServedModel> model = DemoModel();
    bool load = true;  // SetServing at once
  };

  ServiceUnderTest(Engine* engine, Options options);
  ~ServiceUnderTest();

  void Load();  // SetServing
  std::shared_ptr<grpc::Channel> NewChannel(grpc::ChannelArguments arguments = {});

  v1::InferenceService::Stub& stub() { return *stub_; }
  InferenceService& service() { return *service_; }
  EngineCore& core() { return *core_; }
  RecordingObserver& observer() { return observer_; }

 private:
  const Options options_;
  RecordingObserver observer_;
  std::unique_ptr<EngineCore> core_;  // outlives the service
  std::unique_ptr<InferenceService> service_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
  std::unique_ptr<v1::InferenceService::Stub> stub_;
};

// A ScriptedEngine behind a service.
class ServiceTest : public testing::Test {
 protected:
  explicit ServiceTest(ServiceUnderTest::Options options = {})
      : engine_(DemoEngineInfo()), under_test_(&engine_, std::move(options)) {}
  ~ServiceTest() override { engine_.Release(); }

  v1::InferenceService::Stub& stub() { return under_test_.stub(); }

  ScriptedEngine engine_;
  ServiceUnderTest under_test_;
};

// A streamed answer as a client sees it.
struct Streamed {
  std::vector<v1::GenerationEvent> events;
  grpc::Status status;

  std::string content() const;
  std::string reasoning() const;
  int num_deltas() const;
  // REQUIRES: there is one.
  const v1::GenerationEvent::Started& started() const;
  const v1::GenerationEvent::Finished& finished() const;
  const v1::Usage& usage() const;
};

v1::ChatRequest UserSays(const std::string& text);
Streamed StreamChat(v1::InferenceService::Stub& stub, const v1::ChatRequest& request);
Streamed StreamComplete(v1::InferenceService::Stub& stub, const v1::CompleteRequest& request);
// The rest of a stream.
Streamed ReadAll(grpc::ClientReader<v1::GenerationEvent>& reader);

// An error as DESIGN says it must be: one ErrorInfo, a retry delay where due.
struct Error {
  grpc::StatusCode code;
  std::string message;
  std::string reason;
  std::map<std::string, std::string> metadata;
  std::map<std::string, std::string> violations;  // field -> description
  std::optional<double> retry_seconds;
};
// Fails the test unless `status` has exactly one ErrorInfo of the domain latentd, and a RetryInfo
// exactly when the code says so.
Error Explain(const grpc::Status& status);

// Until `condition` holds; false after 10 s.
bool Eventually(const std::function<bool()>& condition);

}  // namespace latentd

#endif  // LATENTD_TESTS_SERVER_SERVICE_SERVICE_FIXTURE_H_
