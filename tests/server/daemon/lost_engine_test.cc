// The loss of the engine, with a daemon in a process of its own: it has to end itself, whatever
// hangs in it. This program is that daemon too, when its first argument is --daemon.

#include <grpcpp/grpcpp.h>
#include <netinet/in.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>

#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "gtest/gtest.h"
#include "latentd/v1/inference.grpc.pb.h"
#include "server/serve.h"
#include "server/status.h"

extern char** environ;

namespace latentd {
namespace {

using grpc::health::v1::Health;
using grpc::health::v1::HealthCheckRequest;
using grpc::health::v1::HealthCheckResponse;
using ::testing::HasSubstr;

constexpr char kCudaError[] = "rank 0: cudaGraphLaunch: an illegal memory access was encountered";

// A good engine that goes wrong in its fourth step.
class FaultyEngine : public Engine {
 public:
  FaultyEngine(std::unique_ptr<Engine> engine, std::string fault)
      : engine_(std::move(engine)), fault_(std::move(fault)) {}

  EngineInfo info() const override { return engine_->info(); }
  absl::StatusOr<StepResult> Execute(const StepPlan& plan) override {
    if (++num_steps_ < 4 || (fault_ == "fail" && num_steps_ > 4)) return engine_->Execute(plan);
    if (fault_ == "hang") absl::SleepFor(absl::InfiniteDuration());
    lost_ = fault_ == "lose";
    return absl::UnavailableError(kCudaError);
  }
  bool lost() const override { return lost_; }

 private:
  const std::unique_ptr<Engine> engine_;
  const std::string fault_;
  int num_steps_ = 0;
  std::atomic<bool> lost_ = false;
};

int RunDaemon(const std::string& fault, const std::string& address) {
  ServeConfig config;
  config.listen = address;
  config.http_listen = "";
  config.engine = "cpu";
  config.log_level = "error";
  config.kv_cache_memory = int64_t{64} << 20;
  config.step_deadline = absl::Seconds(2);
  const auto path = ModelPath::Resolve(config, std::filesystem::absolute("build/latentd"));
  if (!path.ok()) return 99;
  return RunServe(config, *path,
                  [&](const ServeConfig& config, const ModelPath& path,
                      LoadListener* listener) -> absl::StatusOr<LoadedModel> {
                    auto loaded = LoadModel(config, path, listener);
                    if (!loaded.ok()) return loaded.status();
                    loaded->engine =
                        std::make_unique<FaultyEngine>(std::move(loaded->engine), fault);
                    return loaded;
                  });
}

std::string FreeAddress() {
  const int fd = socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  EXPECT_EQ(bind(fd, reinterpret_cast<sockaddr*>(&address), size), 0);
  EXPECT_EQ(getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size), 0);
  close(fd);
  return "127.0.0.1:" + std::to_string(ntohs(address.sin_port));
}

class LostEngineTest : public ::testing::Test {
 protected:
  void Start(std::string fault) {
    std::string address = FreeAddress(), program = "/proc/self/exe", daemon = "--daemon";
    char* arguments[] = {program.data(), daemon.data(), fault.data(), address.data(), nullptr};
    ASSERT_EQ(posix_spawn(&pid_, program.c_str(), nullptr, nullptr, arguments, environ), 0);
    channel_ = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
    inference_ = v1::InferenceService::NewStub(channel_);
    watch_ = Health::NewStub(channel_)->Watch(Wait(&watch_context_), HealthCheckRequest());
    do {
      ASSERT_TRUE(watch_->Read(&health_));
    } while (health_.status() != HealthCheckResponse::SERVING);
  }
  ~LostEngineTest() override {
    watch_context_.TryCancel();
    if (pid_ == 0) return;
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }

  static grpc::ClientContext* Wait(grpc::ClientContext* context) {
    context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(60));
    context->set_wait_for_ready(true);
    return context;
  }

  // An answer that goes on for ever, to its end.
  grpc::Status Stream(int* num_events) {
    v1::ChatRequest request;
    auto* message = request.add_messages();
    message->set_role(v1::ROLE_USER);
    message->set_content("What is MLA?");
    request.mutable_limits()->set_ignore_eos(true);
    grpc::ClientContext context;
    const auto stream = inference_->StreamChat(Wait(&context), request);
    v1::GenerationEvent event;
    while (stream->Read(&event)) ++*num_events;
    return stream->Finish();
  }

  // The exit code, or -1 if the process still runs after `patience`.
  int AwaitExit(absl::Duration patience) {
    const absl::Time end = absl::Now() + patience;
    int status = 0;
    while (waitpid(pid_, &status, WNOHANG) == 0) {
      if (absl::Now() > end) return -1;
      absl::SleepFor(absl::Milliseconds(10));
    }
    pid_ = 0;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }

  void ExpectTheEnd(const grpc::Status& status, const std::string& message) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
    EXPECT_THAT(status.error_message(), HasSubstr(message));
    EXPECT_TRUE(watch_->Read(&health_));
    EXPECT_EQ(health_.status(), HealthCheckResponse::NOT_SERVING);
    EXPECT_EQ(AwaitExit(absl::Seconds(5)), kServeFailed);
  }

  pid_t pid_ = 0;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::InferenceService::Stub> inference_;
  grpc::ClientContext watch_context_;
  std::unique_ptr<grpc::ClientReader<HealthCheckResponse>> watch_;
  HealthCheckResponse health_;
};

TEST_F(LostEngineTest, AnEngineThatIsLostEndsStreamsAndProcess) {
  ASSERT_NO_FATAL_FAILURE(Start("lose"));
  int num_events = 0;
  const grpc::Status status = Stream(&num_events);
  EXPECT_GE(num_events, 2);  // what was computed before has arrived
  ExpectTheEnd(status, kCudaError);
}

TEST_F(LostEngineTest, AStepOverItsDeadlineEndsStreamsAndProcess) {
  ASSERT_NO_FATAL_FAILURE(Start("hang"));
  int num_events = 0;
  const absl::Time begin = absl::Now();
  const grpc::Status status = Stream(&num_events);
  EXPECT_GE(absl::Now() - begin, absl::Seconds(2));
  EXPECT_GE(num_events, 2);
  ExpectTheEnd(status, "rank 0: Execute: a step has not returned for 2");
}

TEST_F(LostEngineTest, AStepThatOnlyFailsCostsItsRequests) {
  ASSERT_NO_FATAL_FAILURE(Start("fail"));
  int num_events = 0;
  const grpc::Status status = Stream(&num_events);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_THAT(status.error_message(), HasSubstr(kCudaError));
  v1::ChatRequest request;
  auto* message = request.add_messages();
  message->set_role(v1::ROLE_USER);
  message->set_content("What is MLA?");
  v1::ChatResponse response;
  grpc::ClientContext context;
  EXPECT_TRUE(inference_->Chat(Wait(&context), request, &response).ok());
  kill(pid_, SIGTERM);
  EXPECT_EQ(AwaitExit(absl::Seconds(20)), kServeOk);
}

}  // namespace
}  // namespace latentd

int main(int argc, char** argv) {
  if (argc == 4 && std::string(argv[1]) == "--daemon") return latentd::RunDaemon(argv[2], argv[3]);
  ::testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
